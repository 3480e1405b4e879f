"""Heat maps of layers over steps, and lines of module types over steps."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from training_lens.analysis.evolution import read_evolution
from training_lens.analysis.figures.style import plot_heat_map, plot_lines
from training_lens.analyzers.module_groups import By, group_series
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series


def plot_update_strength(recording: Recording) -> go.Figure:
    """|dW| / |W| by layer (median of its modules) over steps; |dW| alone without the base's weights."""
    series, unit = _read_strength(recording, "layer")
    return plot_heat_map(series, unit)


def plot_update_strength_by_kind(recording: Recording) -> go.Figure:
    """|dW| / |W| by module type (median) over steps; |dW| alone without the base's weights."""
    return plot_lines(*_read_strength(recording, "kind"))


def _read_strength(recording: Recording, by: By) -> tuple[Series, str]:
    found = read_evolution(recording, "strength", by)
    if np.isfinite(found.values).any():
        return found, "|dW| / |W|"
    return read_evolution(recording, "norm_update", by), "|dW| (base weights unknown)"


def plot_step_ratio_by_kind(recording: Recording) -> go.Figure:
    """The update norm of one step, |change of dW| / |W|, by module type (median) over steps."""
    return plot_lines(read_evolution(recording, "step_ratio", "kind"), "|change of dW| / |W|")


def plot_gradient_norm(recording: Recording) -> go.Figure:
    """The gradient norm of each layer over steps, in logarithmic colours."""
    return plot_heat_map(read_evolution(recording, "gradient_norm", "layer"), "gradient norm", log=True)


def plot_gradient_norm_by_kind(recording: Recording) -> go.Figure:
    """The gradient norm of each module type over steps."""
    return plot_lines(read_evolution(recording, "gradient_norm", "kind"), "gradient norm")


def plot_gradient_cosine(recording: Recording) -> go.Figure:
    """The cosine of each gradient with the running mean of earlier ones, by module type (median) over steps."""
    found = read_evolution(recording, f"{tables.GRADIENTS}.cosine_mean", "kind")
    return plot_lines(found, "cosine with the running mean", at_zero=False)


def plot_effective_rank(recording: Recording) -> go.Figure:
    """The effective rank of dW by layer (median of its modules) over steps; the brightest colour is the full rank."""
    found = read_evolution(recording, f"{tables.SPECTRA}.effective_rank", "layer")
    return plot_heat_map(found, "effective rank, directions", top=_full_rank(recording))


def _full_rank(recording: Recording) -> float | None:
    ranks = [m.rank * (2 if m.variant == "pissa" else 1) for m in recording.modules]
    return float(max(ranks)) if ranks else None


def plot_balance(recording: Recording) -> go.Figure:
    """|B| / |A| by module type (median) over steps."""
    a, b = (read_evolution(recording, measure) for measure in ("norm_a", "norm_b"))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = Series(a.steps, a.names, b.values / a.values)
    return plot_lines(group_series(ratio, recording.modules, "kind", norms=False), "|B| / |A|")


def plot_optimizer_jumps(recording: Recording) -> go.Figure:
    """The root mean square of Adam's update of B by module type (median) over steps: 1 for constant gradients."""
    return plot_lines(read_evolution(recording, f"{tables.OPTIMIZER}.update_rms_b", "kind"), "sqrt(mean(g² / v))")


def plot_adapter_share(recording: Recording) -> go.Figure:
    """The norm of the adapter's output over the frozen weight's on the probe set, by module type (median)."""
    return plot_lines(read_evolution(recording, f"{tables.LORA_ACTIVATIONS}.share", "kind"), "|s B A x| / |W x|")
