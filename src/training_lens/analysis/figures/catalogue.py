"""The figures of a standard report in order, each with the data it needs and a caption on how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go

from training_lens.analysis.figures import layer_figures as layers
from training_lens.analysis.figures.run_figures import plot_divergence
from training_lens.analysis.figures.style import plot_heat_map, plot_lines
from training_lens.analyzers.module_groups import read_evolution
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording


@dataclass(frozen=True)
class ReportFigure:
    """One figure. `draw` needs a recording with the measure `needs[1]` in the table `needs[0]`."""

    name: str
    title: str
    draw: Callable[[Recording], go.Figure]
    needs: tuple[str, str]
    caption: str


CROSS = "An orange cross marks a value that is not finite."

REPORT_FIGURES = (
    ReportFigure(
        "update_strength",
        "Update strength by layer",
        lambda recording: plot_heat_map(*layers.read_strength(recording, "layer")),
        (tables.WEIGHTS, "norm_update"),
        "One row per layer, steps from left to right. Brighter: a larger update relative to the layer's weights. "
        f"An even spread is normal; a single bright row means that one layer carries the update. {CROSS}",
    ),
    ReportFigure(
        "update_strength_by_kind",
        "Update strength by module type",
        lambda recording: plot_lines(*layers.read_strength(recording, "kind")),
        (tables.WEIGHTS, "norm_update"),
        "Lines that grow and flatten are normal; accelerating growth is not.",
    ),
    ReportFigure(
        "step_ratio",
        "Update norm of one step",
        lambda recording: plot_lines(read_evolution(recording, "step_ratio", "kind"), "|change of dW| / |W|"),
        (tables.WEIGHTS, "norm_step"),
        "It should follow the learning rate: up during warm-up, then down. Zero means that the step changed nothing.",
    ),
    ReportFigure(
        "gradient_norm",
        "Gradient norm by layer",
        lambda recording: plot_heat_map(read_evolution(recording, "gradient_norm", "layer"), "gradient norm", log=True),
        (tables.GRADIENTS, "norm_b"),
        "Logarithmic colours; zero is the darkest. Rows that differ from their neighbours by orders of magnitude learn "
        f"at a different speed. {CROSS}",
    ),
    ReportFigure(
        "gradient_norm_by_kind",
        "Gradient norm by module type",
        lambda recording: plot_lines(read_evolution(recording, "gradient_norm", "kind"), "gradient norm"),
        (tables.GRADIENTS, "norm_b"),
        "Before clipping. Peaks come from single batches; a persistent rise is a sign of divergence.",
    ),
    ReportFigure(
        "gradient_cosine",
        "Agreement with earlier gradients",
        lambda recording: plot_lines(
            read_evolution(recording, f"{tables.GRADIENTS}.cosine_mean", "kind"),
            "cosine with the running mean",
            at_zero=False,
        ),
        (tables.GRADIENTS, "cosine_mean"),
        "1: all steps go in the same direction. About 0: batches disagree, as is normal late in training. Below 0: "
        "steps undo each other.",
    ),
    ReportFigure(
        "effective_rank",
        "Effective rank by layer",
        layers.plot_effective_rank,
        (tables.SPECTRA, "effective_rank"),
        "The brightest colour is the full rank of the adapter. Rows that stay dark need less. " + CROSS,
    ),
    ReportFigure(
        "spectrum",
        "Spectrum of the strongest module over steps",
        layers.plot_spectrum_over_steps,
        (tables.SPECTRA, "singular_values"),
        "Each line is a singular value of dW. If a few lines are far above the rest, most of the rank is hardly used.",
    ),
    ReportFigure(
        "spectrum_by_kind",
        "Spectrum at the last step by module type",
        layers.plot_spectrum_by_kind,
        (tables.SPECTRA, "singular_values"),
        "Median over the modules of a type, relative to the largest value. A steep decrease uses few directions; a "
        "flat line uses all of them and may need a higher rank.",
    ),
    ReportFigure(
        "balance",
        "Balance of B and A",
        layers.plot_balance,
        (tables.WEIGHTS, "norm_b"),
        "A new LoRA starts at 0 because B is 0. Far above 1, B does the work and A hardly learns.",
    ),
    ReportFigure(
        "optimizer",
        "Adam's update RMS",
        lambda recording: plot_lines(
            read_evolution(recording, f"{tables.OPTIMIZER}.update_rms_b", "kind"), "sqrt(mean(g² / v))"
        ),
        (tables.OPTIMIZER, "update_rms_b"),
        "1: gradients are as large as Adam expects. Peaks well above 1 often come before loss spikes.",
    ),
    ReportFigure(
        "drift",
        "Drift of layer outputs from the base",
        layers.plot_activation_drift,
        (tables.ACTIVATIONS, "drift"),
        f"On the probe set. Changes of early layers add up in later ones, so upper rows are often brighter. {CROSS}",
    ),
    ReportFigure(
        "share",
        "The adapter's share of the outputs",
        layers.plot_adapter_share,
        (tables.LORA_ACTIVATIONS, "share"),
        "On the probe set. 0.1 means that the adapter's output is a tenth of the frozen weight's.",
    ),
    ReportFigure(
        "kl",
        "KL divergence from the base",
        plot_divergence,
        (tables.DIVERGENCE, "kl"),
        "On the probe set. It rises as the adapter learns. If it keeps rising while the validation loss is flat, the "
        "model may be forgetting.",
    ),
)
