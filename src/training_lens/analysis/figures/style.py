"""The style of all figures: colour-blind safe, units on axes, readable on a phone and in dark mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import cycle, product
from typing import Any

import numpy as np
import plotly.graph_objects as go

from training_lens.core.types import Series
from training_lens.display.colors import ALARM, COLOURS, GRID, INK
from training_lens.display.downsampling import thin_line, thin_rows, thin_steps

DASHES = ("solid", "dash", "dot", "dashdot")
SCALE = "Cividis"  # colour-blind safe, with evenly increasing lightness
CLEAR = "rgba(0, 0, 0, 0)"
UNUSED_BUTTONS = ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
BELOW_TICKS = 24  # pixels: beside a category axis, Plotly counts the standoff from the axis and not from its labels
DECADES = range(-30, 31)


def build_canvas(x: str, y: str, height: int = 380) -> go.Figure:
    """An empty figure with axis titles: the quantity and its unit."""
    figure = go.Figure()
    figure.update_layout(template="none", autosize=True, height=height, margin={"l": 10, "r": 10, "t": 30, "b": 10})
    figure.update_layout(paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, font={"color": INK, "size": 13})
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"})
    figure.update_layout(dragmode=False)  # dragging scrolls the page on a phone; buttons zoom
    figure.update_layout(modebar={"bgcolor": CLEAR, "color": INK, "activecolor": ALARM, "remove": UNUSED_BUTTONS})
    axis = {"automargin": True, "gridcolor": GRID, "zeroline": False, "linecolor": GRID}
    figure.update_xaxes(title={"text": x, "standoff": 8}, **axis)
    figure.update_yaxes(title={"text": y, "standoff": 8}, exponentformat="power", **axis)
    return figure


def empty_figure(text: str) -> go.Figure:
    """A figure with a text that says why it is empty."""
    figure = build_canvas("", "", height=120)
    figure.add_annotation(text=escape(text), showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)


def plot_lines(series: Series, y: str, *, at_zero: bool = True) -> go.Figure:
    """A line for each name over steps; `y` is the quantity and its unit, from 0 unless `at_zero` is false."""
    if not series.values.size:
        return empty_figure("no data was captured for this figure")
    figure = build_canvas("step", y)
    for name, look in zip(series.names, line_styles(), strict=False):
        add_line(figure, series.steps, series.column(name), escape(name), **look)
    return figure.update_yaxes(rangemode="tozero") if at_zero else figure


def line_styles() -> Iterable[dict[str, Any]]:
    """A colour and dash style per line, unique for the first 24."""
    return cycle([{"color": colour, "dash": dash} for dash, colour in product(DASHES, COLOURS)])


def add_line(figure: go.Figure, steps: np.ndarray, values: np.ndarray, name: str, **look: Any) -> None:
    """A line of at most 1,000 points; few points are marked."""
    kept = np.isfinite(values) if len(steps) < 30 else slice(None)  # sparse captures: no gaps between them
    x, y = thin_line(steps[kept], values[kept])
    mode = "lines+markers" if len(x) < 30 else "lines"
    figure.add_scatter(x=x, y=y.astype(np.float32), name=name, mode=mode, line={"width": 1.8, **look})


def plot_heat_map(series: Series, unit: str, *, log: bool = False, top: float | None = None) -> go.Figure:
    """A heat map with layers from bottom to top and steps from left to right; crosses mark non-finite values.

    Args:
        unit: the quantity of the colours.
        log: logarithmic colours; hovering shows the value itself.
        top: the value of the brightest colour; None: the largest value.
    """
    if not series.values.size:
        return empty_figure("no data was captured for this figure")
    steps, values = thin_steps(series.steps, series.values.T)
    names, values = thin_rows(series.names, values)
    shown = _log_values(values) if log else np.where(np.isfinite(values), values, np.nan)
    figure = build_canvas("step", "layer", height=180 + 16 * max(4, len(names)))
    bar = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 10, "outlinewidth": 0}
    ticks = _decade_ticks(shown) if log else {}
    figure.add_heatmap(
        x=steps,
        y=[escape(name) for name in names],
        z=shown.astype(np.float32),
        customdata=values.astype(np.float32) if log else None,
        hovertemplate=f"layer %{{y}}, step %{{x}}: %{{{'customdata' if log else 'z'}:.3g}}<extra></extra>",
        colorscale=SCALE,
        zmin=None if log else 0,
        zmax=top if not log else None,
        colorbar={"title": {"text": unit, "side": "top"}, "exponentformat": "power", **bar, **ticks},
    )
    _mark_nonfinite(figure, steps, names, values)
    figure.update_yaxes(type="category", showgrid=False)
    return figure.update_xaxes(showgrid=False, title_standoff=BELOW_TICKS)


def _log_values(values: np.ndarray) -> np.ndarray:
    """log10, with zeros at the lowest positive value; NaN for non-finite values."""
    finite = np.where(np.isfinite(values), values, np.nan)
    positive = finite[finite > 0]
    lowest = positive.min() if positive.size else 1.0
    return np.log10(np.maximum(finite, lowest))


def _decade_ticks(logarithms: np.ndarray) -> dict[str, list[Any]]:
    """Ticks at powers of ten, and for a small range also at 2 and 5 times these."""
    low, high = _finite_range([logarithms])
    powers = [f"{factor}e{power}" for power in DECADES for factor in ((1, 2, 5) if high - low < 2 else (1,))]
    return {"tickvals": [float(np.log10(float(power))) for power in powers], "ticktext": powers}


def _mark_nonfinite(figure: go.Figure, steps: np.ndarray, names: Sequence[str], values: np.ndarray) -> None:
    row, column = np.nonzero(~np.isfinite(values))
    if len(row):
        marker = {"symbol": "x-thin", "size": 6, "line": {"color": ALARM, "width": 2}}
        x, y = steps[column], [escape(names[int(i)]) for i in row]
        figure.add_scatter(x=x, y=y, mode="markers", marker=marker, name="not finite", hoverinfo="name+x")


def match_scales(first: go.Figure, second: go.Figure) -> tuple[go.Figure, go.Figure]:
    """Two figures of one kind with the same colour scale and axes, so that they can be compared."""
    pair = (go.Figure(first), go.Figure(second))
    for axis in ("x", "y"):
        _match_axis(pair, axis)
    colours = [trace for figure in pair for trace in figure.data if trace.type == "heatmap"]
    if colours:
        low = min(_finite_range([trace.z])[0] if trace.zmin is None else trace.zmin for trace in colours)
        high = max(_finite_range([trace.z])[1] if trace.zmax is None else trace.zmax for trace in colours)
        for trace in colours:
            trace.update(zmin=low, zmax=high)
    return pair


def _match_axis(pair: tuple[go.Figure, go.Figure], axis: str) -> None:
    found = [np.asarray(trace[axis]) for figure in pair for trace in figure.data if trace[axis] is not None]
    numbers = [values for values in found if values.dtype.kind in "iuf" and values.size]
    if not numbers:
        return
    low, high = _finite_range(numbers)
    for figure in pair:
        layout = figure.layout[f"{axis}axis"]
        start = min(low, 0.0) if layout.rangemode == "tozero" else low
        room = 0.05 * (high - start) if axis == "y" else 0.0
        layout.range = [start, high + room]


def _finite_range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """The lowest and highest finite value; 0 and 1 if there is none."""
    flat = np.concatenate([np.asarray(v, float).ravel() for v in values])
    flat = flat[np.isfinite(flat)]
    return (float(flat.min()), float(flat.max())) if flat.size else (0.0, 1.0)
