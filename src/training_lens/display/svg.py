"""Line charts and heat maps as small SVGs: a few kB instead of Plotly's megabytes, shown by all viewers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from training_lens.display.colors import ALARM, COLOURS, GRID, INK
from training_lens.display.downsampling import thin_line
from training_lens.utils.formatting import reveal_controls

WIDTH, PLOT_HEIGHT, LINE_HEIGHT = 640, 220, 18  # pixels of the drawing; it shrinks with its column
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40  # margins of the plot
MOST_POINTS = 240  # of a curve: about one for two pixels
TICKS = 5  # about as many on an axis at most
CELL_WIDTH, CELL_HEIGHT, HEADER, LETTER = 48, 22, 26, 7  # pixels; of a letter of 12 pixels at most
STRONGEST = 0.9  # opacity of the largest number's cell
DARK = 0.6  # opacity from which a cell's number is white


@dataclass(frozen=True)
class Curve:
    """A line with its name in the legend. `dots` marks each point, for short curves; `is_marked` rings them instead.

    `steps` and `values` are (points,). The line has a gap where a value is not finite.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    dots: bool = False
    dashed: bool = False
    is_marked: bool = False  # rings around points of other curves, without a line


def render_chart(curves: Sequence[Curve], x: str, y: str, *, log_x: bool = False) -> str:
    """The SVG of curves on axes titled `x` and `y`, with a legend below. Empty if no value is finite.

    With `log_x` the steps are above 0 and the axis is logarithmic.
    """
    shown = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not shown:
        return ""
    if log_x:
        shown = [replace(curve, steps=np.log10(curve.steps)) for curve in shown]
    axes = replace(_Axes.from_curves(shown), is_log=log_x)
    parts = [*axes.render_grid(x, y), *(_render_curve(curve, axes) for curve in shown)]
    for row, curve in enumerate(shown):
        down = PLOT_HEIGHT + 4 + LINE_HEIGHT * row
        line = f'<path d="M{LEFT} {down}h24" stroke="{curve.colour}" stroke-width="2"{_dashes(curve)}/>'
        mark = _render_ring(LEFT + 12, down, curve.colour) if curve.is_marked else line
        parts += [mark, _render_text(LEFT + 32, down + 4, curve.name, "start")]
    return _render_drawing(parts, [curve.name for curve in shown], f"{y} by {x}")


@dataclass(frozen=True)
class Dots:
    """Points of one colour with their name in the legend; `titles` says what hovering over each shows.

    `x` and `y` are (points,) and finite.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    titles: Sequence[str]
    colour: str


def render_dots(groups: Sequence[Dots], x: str, y: str) -> str:
    """The SVG of a scatter plot on axes titled `x` and `y`, with a legend below. Empty if there is no point.

    Later groups are drawn over earlier ones. Names and titles are escaped.
    """
    shown = [group for group in groups if len(group.x)]
    if not shown:
        return ""
    axes = _Axes.from_curves([Curve(group.name, group.x, group.y, group.colour) for group in shown])
    parts = list(axes.render_grid(x, y))
    for row, group in enumerate(shown):
        down = PLOT_HEIGHT + 4 + LINE_HEIGHT * row
        mark = f'<circle cx="{LEFT + 12}" cy="{down}" r="4" fill="{group.colour}"/>'
        parts += [*_render_dots(group, axes), mark, _render_text(LEFT + 32, down + 4, group.name, "start")]
    return _render_drawing(parts, [group.name for group in shown], f"{y} by {x}")


def _render_dots(group: Dots, axes: _Axes) -> Iterator[str]:
    for x, y, title in zip(group.x, group.y, group.titles, strict=True):
        across, down = axes.to_pixels(x, y)
        yield (
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{group.colour}" fill-opacity="0.6">'
            f"<title>{escape(reveal_controls(title))}</title></circle>"
        )


def _render_drawing(parts: Sequence[str], names: Sequence[str], title: str) -> str:
    """The SVG, whose label for screen readers says what is drawn."""
    height = PLOT_HEIGHT + LINE_HEIGHT * len(names)
    label = escape(reveal_controls(f"{title}: {', '.join(names)}"))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" style="max-width: 100%; height: auto" '
        f'role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


@dataclass(frozen=True)
class _Axes:
    """The ranges of steps and values that the plot shows."""

    x: tuple[float, float]
    y: tuple[float, float]
    is_log: bool = False  # x holds powers of ten

    @classmethod
    def from_curves(cls, curves: Sequence[Curve]) -> _Axes:
        steps = np.concatenate([curve.steps for curve in curves]).astype(float)
        values = np.concatenate([curve.values for curve in curves])
        values = values[np.isfinite(values)]
        (left, right), (low, high) = ((float(a.min()), float(a.max())) for a in (steps, values))
        # A range of one value is widened by 1.
        x = (left, right) if right > left else (left - 0.5, left + 0.5)
        return cls(x, (low, high) if high > low else (low - 0.5, low + 0.5))

    def to_pixels(self, step: float, value: float) -> tuple[float, float]:
        """The position in pixels from the left and the top."""
        across = (step - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), PLOT_HEIGHT - BOTTOM - up * (PLOT_HEIGHT - TOP - BOTTOM)

    def render_grid(self, x: str, y: str) -> Iterator[str]:
        """Grid lines with their numbers, and the axis titles."""
        bottom, right = PLOT_HEIGHT - BOTTOM, WIDTH - RIGHT
        for value in axis_ticks(*self.y):
            _, at = self.to_pixels(self.x[0], value)
            yield f'<path d="M{LEFT} {at:.1f}H{right}" stroke="{GRID}"/>' + _render_text(
                LEFT - 6, at + 4, f"{value:g}", "end"
            )
        for step in self._step_ticks():
            at, _ = self.to_pixels(math.log10(step) if self.is_log else step, self.y[0])
            yield f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="{GRID}"/>'
            yield _render_text(at, bottom + 16, f"{step:,g}" if step < 1e6 else f"{step:.3g}", "middle")
        yield _render_text((LEFT + right) / 2, bottom + 32, x, "middle")
        middle = (TOP + bottom) / 2
        yield f'<g transform="rotate(-90 12 {middle})">{_render_text(12, middle, y, "middle")}</g>'

    def _step_ticks(self) -> list[float]:
        """On a logarithmic axis 1, 2 and 5 times powers of ten; those of `axis_ticks` elsewhere."""
        if not self.is_log:
            return axis_ticks(*self.x)
        decades = range(math.floor(self.x[0]), math.ceil(self.x[1]) + 1)
        marks = [float(f"{factor}e{power}") for power in decades for factor in (1, 2, 5)]
        return [mark for mark in marks if self.x[0] <= math.log10(mark) <= self.x[1]]


def axis_ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    Example:
        >>> axis_ticks(0.3, 9.9)
        [2.0, 4.0, 6.0, 8.0]
    """
    rough = (high - low) / TICKS
    power = 10.0 ** np.floor(np.log10(rough))
    each = next(float(factor * power) for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(i * each, 12) for i in range(int(np.ceil(low / each)), int(np.floor(high / each)) + 1)]


def _render_curve(curve: Curve, axes: _Axes) -> str:
    steps, values = thin_line(curve.steps, curve.values, MOST_POINTS)
    path, points, pen = "", [], "M"
    for step, value in zip(steps, values, strict=True):
        if not np.isfinite(value):
            pen = "M"
            continue
        across, down = axes.to_pixels(step, value)
        path += f"{pen}{across:.1f} {down:.1f}"
        points.append((across, down))
        pen = "L"
    if curve.is_marked:
        return "".join(_render_ring(across, down, curve.colour) for across, down in points)
    line = f'<path d="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.6"{_dashes(curve)}/>'
    dots = [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{curve.colour}"/>' for across, down in points]
    return line + "".join(dots) if curve.dots or len(dots) == 1 else line


def _render_ring(across: float, down: float, colour: str) -> str:
    return f'<circle cx="{across:.1f}" cy="{down:.1f}" r="6" fill="none" stroke="{colour}" stroke-width="2"/>'


def _dashes(curve: Curve) -> str:
    return ' stroke-dasharray="6 4"' if curve.dashed else ""


def _render_text(across: float, down: float, words: str, anchor: str) -> str:
    return f'<text x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(words)}</text>'


def render_heat_map(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, form: str = "{:.1f}", titles: str = "{} {}: {}"
) -> str:
    """The SVG of `values` (rows, columns), each with its number; a NaN leaves its cell empty.

    Args:
        form: of a number in its cell; `titles`: of the text that a mouse over the cell shows, given its row, column
            and number.
    """
    left = 12 + LETTER * max(map(len, rows), default=0)
    width, height = left + CELL_WIDTH * len(columns) + 4, HEADER + CELL_HEIGHT * len(rows) + 4
    known = np.abs(values[np.isfinite(values)])
    largest = float(known.max()) if known.size and known.max() > 0 else 1.0
    parts = [_render_label(left + CELL_WIDTH * (j + 0.5), HEADER - 8, name, "middle") for j, name in enumerate(columns)]
    for i, name in enumerate(rows):
        down = HEADER + CELL_HEIGHT * i
        parts.append(_render_label(left - 6, down + 15, name, "end"))
        for j, column in enumerate(columns):
            if np.isfinite(values[i, j]):
                number = form.format(values[i, j])
                cell = _render_cell(left + CELL_WIDTH * j, down, float(values[i, j]) / largest, number)
                parts.append(f"<g><title>{escape(titles.format(name, column, number))}</title>{cell}</g>")
    label = f"{len(rows)} rows by {len(columns)} columns of numbers: {escape(reveal_controls(', '.join(columns)))}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width: 100%; height: auto" role="img" '
        f'aria-label="{label}" xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


def _render_cell(across: float, down: float, strength: float, number: str) -> str:
    """A cell whose colour is as strong as `strength`, from -1 to 1."""
    opacity, colour = STRONGEST * abs(strength), COLOURS[0] if strength < 0 else ALARM
    box = (
        f'<rect x="{across:.0f}" y="{down}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" fill="{colour}" '
        f'fill-opacity="{opacity:.3f}" stroke="{GRID}"/>'
    )
    ink = "#fff" if opacity > DARK else "currentColor"
    middle = across + CELL_WIDTH / 2 - 1
    return (
        f'{box}<text x="{middle:.0f}" y="{down + 14}" text-anchor="middle" font-size="11" fill="{ink}">{number}</text>'
    )


def _render_label(across: float, down: float, words: str, anchor: str) -> str:
    return f'<text x="{across:.0f}" y="{down}" text-anchor="{anchor}" fill="{INK}">{escape(words)}</text>'
