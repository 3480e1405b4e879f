"""The pictures of a standard report, in their order: each with what it needs, and a line that says how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go

from training_lens.analysis.figures import activation_figures as activations
from training_lens.analysis.figures import layer_figures as layers
from training_lens.analysis.figures import run_figures as runs
from training_lens.analysis.figures import spectrum_figures as spectra
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording


@dataclass(frozen=True)
class ReportFigure:
    """One picture: `draw` makes it of a recording that has the measure `of[1]` in the table `of[0]`."""

    name: str
    title: str
    draw: Callable[[Recording], go.Figure]
    needs: tuple[str, str]
    caption: str


CROSS = "An orange cross marks a value that is not finite."

REPORT_FIGURES = (
    ReportFigure(
        "update_strength",
        "How strongly each layer is changed",
        layers.plot_update_strength,
        (tables.WEIGHTS, "norm_update"),
        "Each row is a layer, training goes to the right; brighter is a larger change against the layer's own weights. "
        f"An even spread is usual; a single bright row means that one layer carries the update. {CROSS}",
    ),
    ReportFigure(
        "update_strength_by_kind",
        "The same by kind of module",
        layers.plot_update_strength_by_kind,
        (tables.WEIGHTS, "norm_update"),
        "Lines that grow and flatten are usual; one that grows ever faster is not.",
    ),
    ReportFigure(
        "step_ratio",
        "How far one step moves",
        layers.plot_step_ratio_by_kind,
        (tables.WEIGHTS, "norm_step"),
        "It should follow the learning rate: up with the warm-up, then down. Zero is a step that changed nothing.",
    ),
    ReportFigure(
        "gradient_norm",
        "Gradients by layer",
        layers.plot_gradient_norm,
        (tables.GRADIENTS, "norm_b"),
        "Colours by the power of ten; zero has the darkest. Rows that are many powers from their neighbours learn at "
        f"another pace. {CROSS}",
    ),
    ReportFigure(
        "gradient_norm_by_kind",
        "Gradients by kind of module",
        layers.plot_gradient_norm_by_kind,
        (tables.GRADIENTS, "norm_b"),
        "Before clipping. Peaks are single batches; a rise that stays means that training goes astray.",
    ),
    ReportFigure(
        "gradient_cosine",
        "Whether gradients agree with those before",
        layers.plot_gradient_cosine,
        (tables.GRADIENTS, "cosine_mean"),
        "1: every step pulls the same way; about 0: the batches disagree, as late in training; below 0: steps undo one "
        "another.",
    ),
    ReportFigure(
        "effective_rank",
        "How many directions each layer uses",
        layers.plot_effective_rank,
        (tables.SPECTRA, "effective_rank"),
        "The brightest colour is the rank that the adapter may use. Rows that stay dark need less of it. " + CROSS,
    ),
    ReportFigure(
        "spectrum",
        "The strongest module's spectrum over time",
        spectra.plot_spectrum_over_steps,
        (tables.SPECTRA, "singular_values"),
        "Each line is a direction of the change of the weight. Few lines far above the rest: most of the rank is "
        "hardly used.",
    ),
    ReportFigure(
        "spectrum_by_kind",
        "Spectra at the end",
        spectra.plot_spectrum_by_kind,
        (tables.SPECTRA, "singular_values"),
        "Median of each kind's modules, over the largest. A steep fall uses few directions; a flat line uses all, and "
        "may want more.",
    ),
    ReportFigure(
        "balance",
        "B against A",
        layers.plot_balance,
        (tables.WEIGHTS, "norm_b"),
        "A fresh LoRA starts at 0, as its B is 0. Far above 1, B does the work and A hardly learns.",
    ),
    ReportFigure(
        "optimizer",
        "Whether Adam is surprised",
        layers.plot_optimizer_jumps,
        (tables.OPTIMIZER, "update_rms_b"),
        "1: gradients are as large as Adam expects; peaks well above come before spikes of the loss.",
    ),
    ReportFigure(
        "drift",
        "How far layers' outputs drift from the base",
        activations.plot_activation_drift,
        (tables.ACTIVATIONS, "drift"),
        f"On the probe set. Later layers get what early ones change, so that upper rows are often brighter. {CROSS}",
    ),
    ReportFigure(
        "share",
        "The adapter's part of the outputs",
        layers.plot_adapter_share,
        (tables.LORA_ACTIVATIONS, "share"),
        "On the probe set: 0.1 means that the adapter adds a tenth of what the frozen weight gives.",
    ),
    ReportFigure(
        "kl",
        "How far the answers are from the base's",
        runs.plot_divergence,
        (tables.DIVERGENCE, "kl"),
        "On the probe set. It rises as the adapter learns; if it goes on rising while the validation loss stands "
        "still, the model may be forgetting what it knew.",
    ),
)


def find_figure(name: str) -> ReportFigure:
    """A drawing of `REPORT_FIGURES`."""
    return next(drawing for drawing in REPORT_FIGURES if drawing.name == name)
