"""Figures of the whole run: its loss with events, the divergence from the base, and the cost of the lens."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from training_lens.analysis.figures.style import add_line, build_canvas, empty_figure, plot_lines
from training_lens.analysis.logs import Log
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.display.colors import ALARM, COLOURS, GRID
from training_lens.measures.curves import robust_z

SPIKE = 6.0  # robust deviations above the running median
WINDOW = 21  # steps of that median
MOST_SPIKES, MOST_BORDERS, SMOOTH_POINTS = 50, 40, 60


def plot_loss(recording: Recording | Log, checkpoints: Sequence[int] = ()) -> go.Figure:
    """The training loss of each step, its median in equal parts, the validation loss, and events (`checkpoints`)."""
    series, validation = recording.series(tables.LOSS, "loss"), recording.series(tables.EVALUATION, "loss")
    if not (series.values.size or validation.values.size):
        return empty_figure("no loss was captured")
    figure = build_canvas("step", "loss, nats per supervised token", height=420)
    if series.values.size:
        _add_training(figure, series.steps, series.values[:, 0])
    _add_validation(figure, recording, validation)
    if len(checkpoints):
        marker = {"symbol": "triangle-up", "size": 9, "color": COLOURS[3]}
        losses = np.concatenate([series.values.ravel(), validation.values.ravel()])
        lowest = min(losses[np.isfinite(losses)], default=0.0)
        y = [float(lowest)] * len(checkpoints)
        figure.add_scatter(x=list(checkpoints), y=y, mode="markers", marker=marker, name="checkpoint")
    for step in find_epoch_ends(recording):
        figure.add_vline(x=step, line={"color": GRID, "width": 1.5, "dash": "dash"})
    return figure


def _add_training(figure: go.Figure, steps: np.ndarray, values: np.ndarray) -> None:
    many = is_long(steps)
    add_line(figure, steps, values, "training", color=COLOURS[5] if many else COLOURS[0])
    if many:
        figure.data[0].update(opacity=0.5, line={"width": 1})
        add_line(figure, *smooth_line(steps, values), "training, median of equal parts", color=COLOURS[0])
    odd = find_spikes(steps, values)
    if len(odd):
        marker = {"symbol": "x", "size": 8, "color": ALARM}
        shown = np.isin(steps, odd)
        highest = np.nanmax(np.where(np.isfinite(values), values, np.nan)) if np.isfinite(values).any() else 0.0
        seen = np.where(np.isfinite(values), values, highest)[shown]  # non-finite values are drawn at the highest loss
        figure.add_scatter(x=steps[shown], y=seen, mode="markers", marker=marker, name="spike")


def is_long(steps: np.ndarray) -> bool:
    """Whether a line has too many steps to be read without `smooth_line`."""
    return len(steps) > 2 * SMOOTH_POINTS


def smooth_line(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean step and the median of the finite values in each of 60 equal parts of a line."""
    parts = np.array_split(np.arange(len(steps)), SMOOTH_POINTS)
    finite = [part[np.isfinite(values[part])] for part in parts]
    kept = [part for part in finite if len(part)]
    return np.array([steps[part].mean() for part in kept]), np.array([np.median(values[part]) for part in kept])


def find_spikes(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The steps whose loss is not finite, or 6 robust deviations above the running median of 21 steps; at most 50.

    A robust deviation is 1.4826 times the median distance of all losses from their running median. A spike exceeds it
    in nats and in their logarithm, because early losses scatter by more nats and small losses by larger factors.
    """
    finite = np.isfinite(values)
    broken: np.ndarray = steps[~finite][:MOST_SPIKES]
    known = values[finite]
    if len(known) < WINDOW:
        return broken
    padded = np.pad(known, WINDOW // 2, mode="reflect", reflect_type="odd")  # a falling line keeps falling
    running = np.median(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), axis=1)
    tiny = np.finfo(float).tiny
    factors = np.log(np.maximum(known, tiny)) - np.log(np.maximum(running, tiny))
    z = np.fmin(robust_z(known - running), robust_z(factors))
    highest = np.argsort(-z)[:MOST_SPIKES]
    found: np.ndarray = np.concatenate([broken, steps[finite][highest[z[highest] > SPIKE]]])
    return np.sort(found[:MOST_SPIKES])


def find_epoch_ends(recording: Recording | Log) -> list[float]:
    """The steps at which an epoch ended and the next began, at most 40, evenly chosen."""
    series, each = recording.series(tables.LOSS, "loss"), recording.settings.get("steps_per_epoch")
    if not each or not len(series.steps):
        return []
    ends = [epoch * each for epoch in range(1, int((series.steps[-1] - 1) / each) + 1)]
    return ends[:: -(-len(ends) // MOST_BORDERS) or 1]


def _add_validation(figure: go.Figure, recording: Recording | Log, validation: Series) -> None:
    base = recording.series(tables.EVALUATION, "base_loss").values.ravel()
    if len(base) and np.isfinite(base[0]):
        line = {"color": COLOURS[2], "dash": "dot", "width": 1.5}
        figure.add_hline(base[0], line=line, annotation_text="validation, base", annotation_position="top left")
    if not validation.values.size:
        return
    values = validation.values[:, 0]
    add_line(figure, validation.steps, values, "validation", color=COLOURS[2])
    figure.data[-1].update(mode="lines+markers")
    if np.isfinite(values).any():
        best = int(np.nanargmin(values))
        marker = {"symbol": "star", "size": 14, "color": COLOURS[4]}
        figure.add_scatter(
            x=validation.steps[[best]], y=values[[best]], mode="markers", marker=marker, name="best validation"
        )


def plot_divergence(recording: Recording) -> go.Figure:
    """The forward KL from the base on the probe set, over steps."""
    found = recording.series(tables.DIVERGENCE, "kl")
    return plot_lines(Series(found.steps, ("KL(base || adapter)",)[: len(found.names)], found.values), "nats per token")


def plot_cost(recording: Recording) -> go.Figure:
    """The seconds of each collector, and of their shared work."""
    seconds = recording.captures.cost()
    if not seconds:
        return empty_figure("no cost was recorded")
    upwards = sorted(seconds.items(), key=lambda item: item[1])
    figure = build_canvas("seconds", "", height=120 + 26 * len(upwards))
    names, values = [escape(name) for name, _ in upwards], [value for _, value in upwards]
    return figure.add_bar(x=values, y=names, orientation="h", marker={"color": COLOURS[0]}, hovertemplate="%{x:.3g} s")
