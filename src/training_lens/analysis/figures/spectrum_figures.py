"""Singular values of dW: over steps for one module, and at the last step by module type."""

from __future__ import annotations

import warnings

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from training_lens.analysis.figures.style import SCALE, add_line, build_canvas, empty_figure, escape_label, line_styles
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording

MOST_VALUES = 12  # lines in one figure


def find_strongest_module(recording: Recording) -> str | None:
    """The module with the largest first singular value of dW at the last step; None without spectra."""
    spectra = _read_spectra(recording)[1]
    largest = {name: values[-1, 0] for name, values in spectra.items() if values.size and np.isfinite(values[-1, 0])}
    return max(largest, key=lambda name: largest[name]) if largest else None


def plot_spectrum_over_steps(recording: Recording, module: str | None = None) -> go.Figure:
    """The singular values of one module's dW over steps, at most 12 of them, evenly chosen.

    Args:
        module: its name; None: the strongest module.
    """
    steps, spectra = _read_spectra(recording)
    name = module or find_strongest_module(recording)
    if name not in spectra:
        return empty_figure("no singular values were captured")
    values = spectra[name]
    chosen = np.unique(np.linspace(0, values.shape[1] - 1, MOST_VALUES).round().astype(int))
    colours = sample_colorscale(SCALE, np.linspace(0.1, 0.9, len(chosen)).tolist())
    figure = build_canvas("step", "singular values of dW")
    figure.update_layout(legend_title={"text": escape_label(name), "side": "top"})
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN only
        middle = np.nanmedian(padded, axis=0)
    add_line(figure, np.arange(1, longest + 1), middle, escape_label(kind), **look)


def _read_spectra(recording: Recording) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if not recording.has(tables.SPECTRA, "singular_values"):
        return np.zeros(0, np.int64), {}
    return recording.captures.vectors(tables.SPECTRA, "singular_values")
