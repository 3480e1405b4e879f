"""Figures by layer, module type and direction of dW, over steps; and of activations in a single pass."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from training_lens.analysis.figures.run_figures import plot_divergence
from training_lens.analysis.figures.style import (
    SCALE,
    add_line,
    build_canvas,
    empty_figure,
    line_styles,
    plot_heat_map,
    plot_lines,
)
from training_lens.analyzers.module_groups import By, group_series, nan_median, read_evolution, spread_indices
from training_lens.collectors.layer_activations import LayerStates
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.errors import LensError
from training_lens.measures.activation_measures import rms

MOST_VALUES = 12  # lines of singular values in one figure


def read_strength(recording: Recording, by: By) -> tuple[Series, str]:
    """|dW| / |W| (medians over modules) and its unit; |dW| alone without the base's weights."""
    found = read_evolution(recording, "strength", by)
    if np.isfinite(found.values).any():
        return found, "|dW| / |W|"
    return read_evolution(recording, "norm_update", by), "|dW| (base weights unknown)"


def plot_effective_rank(recording: Recording) -> go.Figure:
    """The effective rank of dW by layer (median of its modules) over steps; the brightest colour is the full rank."""
    found = read_evolution(recording, f"{tables.SPECTRA}.effective_rank", "layer")
    ranks = [m.rank * (2 if m.variant == "pissa" else 1) for m in recording.modules]
    return plot_heat_map(found, "effective rank, directions", top=float(max(ranks)) if ranks else None)


def plot_balance(recording: Recording) -> go.Figure:
    """|B| / |A| by module type (median) over steps."""
    a, b = (read_evolution(recording, measure) for measure in ("norm_a", "norm_b"))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = Series(a.steps, a.names, b.values / a.values)
    return plot_lines(group_series(ratio, recording.modules, "kind", norms=False), "|B| / |A|")


def plot_adapter_share(recording: Recording) -> go.Figure:
    """The norm of the adapter's output over the frozen weight's on the probe set, by module type (median)."""
    return plot_lines(read_evolution(recording, f"{tables.LORA_ACTIVATIONS}.share", "kind"), "|s B A x| / |W x|")


def plot_spectrum_over_steps(recording: Recording) -> go.Figure:
    """At most 12 singular values, evenly chosen, of the dW whose first one is the largest at the last step."""
    steps, spectra = _read_spectra(recording)
    largest = {name: values[-1, 0] for name, values in spectra.items() if values.size and np.isfinite(values[-1, 0])}
    if not largest:
        return empty_figure("no singular values were captured")
    name = max(largest, key=largest.__getitem__)
    values = spectra[name]
    chosen = spread_indices(values.shape[1], MOST_VALUES)
    colours = sample_colorscale(SCALE, np.linspace(0.1, 0.9, len(chosen)).tolist())
    figure = build_canvas("step", "singular values of dW")
    figure.update_layout(legend_title={"text": escape(name), "side": "top"})
    for i, colour in zip(chosen, colours, strict=True):
        add_line(figure, steps, values[:, i], f"{i + 1}.", color=colour)
    return figure.update_yaxes(rangemode="tozero")


def plot_spectrum_by_kind(recording: Recording) -> go.Figure:
    """The singular values at the last step relative to the largest, median over the modules of each type."""
    spectra = _read_spectra(recording)[1]
    kinds = dict.fromkeys(m.kind for m in recording.modules)
    figure = build_canvas("direction, strongest first", "singular value / largest")
    for kind, look in zip(kinds, line_styles(), strict=False):
        last = [spectra[m.name][-1] for m in recording.modules if m.kind == kind and m.name in spectra]
        found = [values for values in last if values.size and np.nan_to_num(values[0]) > 0]
        if found:
            _add_spectrum(figure, found, kind, look)
    return figure.update_yaxes(rangemode="tozero") if figure.data else empty_figure("no singular values were captured")


def _add_spectrum(figure: go.Figure, found: list[np.ndarray], kind: str, look: dict[str, str]) -> None:
    longest = max(len(values) for values in found)
    padded = np.full((len(found), longest), np.nan)
    for row, values in zip(padded, found, strict=True):
        row[: len(values)] = values / values[0]
    add_line(figure, np.arange(1, longest + 1), nan_median(padded.T), escape(kind), **look)


def _read_spectra(recording: Recording) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if not recording.has(tables.SPECTRA, "singular_values"):
        return np.zeros(0, np.int64), {}
    return recording.captures.vectors(tables.SPECTRA, "singular_values")


def plot_activation_drift(recording: Recording) -> go.Figure:
    """|h - h0| / |h0| on the probe set, by layer over steps."""
    return plot_heat_map(_read_layers(recording, "drift"), "|h - h0| / |h0|")


def _read_layers(recording: Recording, measure: str) -> Series:
    """A measure of the layer outputs, sorted by layer number."""
    found = recording.series(tables.ACTIVATIONS, measure)
    numbers = [name.removeprefix("layers.") for name in found.names]
    order = sorted(range(len(numbers)), key=lambda i: (not numbers[i].isdigit(), numbers[i].zfill(9)))
    return Series(found.steps, tuple(numbers[i] for i in order), found.values[:, order])


class ActivationVisualizer:
    """Figures of activations.

    Args:
        source: a recording of a run with a probe set, or the result of `ActivationExtractor.extract`.

    Example:
        ActivationVisualizer(CheckpointAnalyzer(run).recording).drift().show()
        ActivationVisualizer(ActivationExtractor(model, tokenizer).extract(texts)).sizes().show()
    """

    def __init__(self, source: Recording | LayerStates) -> None:
        self.source = source

    def drift(self) -> go.Figure:
        """The distance of each layer's output from the one without the adapter, over steps or for these states."""
        if isinstance(self.source, Recording):
            return plot_activation_drift(self.source)
        return _plot_over_layers({"drift": self.source.measures()["drift"].tolist()}, "|h - h0| / |h0|")

    def sizes(self) -> go.Figure:
        """The root mean square of each layer's output, over steps or for these states with the adapter off and on."""
        if isinstance(self.source, Recording):
            return plot_heat_map(_read_layers(self.source, "rms"), "root mean square", log=True)
        sides = {"adapter off": self.source.base, "adapter on": self.source.adapter}
        sizes = {name: [float(rms(h)) for h in side] for name, side in sides.items()}
        return _plot_over_layers(sizes, "root mean square")

    def share(self) -> go.Figure:
        """The adapter's share of the output over steps, by module type; needs a recording."""
        return plot_adapter_share(self._require_recording())

    def divergence(self) -> go.Figure:
        """The forward KL from the base over steps; needs a recording."""
        return plot_divergence(self._require_recording())

    def _require_recording(self) -> Recording:
        if isinstance(self.source, Recording):
            return self.source
        raise LensError(
            "this figure is over steps, but ActivationVisualizer has the states of a single pass. Give it the "
            "recording of a run (CheckpointAnalyzer(RUN).recording)."
        )


def _plot_over_layers(values: Mapping[str, list[float]], y: str) -> go.Figure:
    figure = build_canvas("layer", y)
    for name, by_layer in values.items():
        add_line(figure, np.arange(len(by_layer)), np.array(by_layer), name)
    return figure.update_yaxes(rangemode="tozero")
