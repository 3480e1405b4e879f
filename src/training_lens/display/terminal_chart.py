"""Charts made of characters: a curve in braille dots, a heat map in blocks. Pure functions from numbers to lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.text import Text

from training_lens.display.downsampling import thin_rows
from training_lens.utils.formatting import BLOCKS

ACCENT, DIM = "cyan", "bright_black"  # styles
SYMBOLS = {"first": "○", "part": "◦", "mark": "●"}  # of points over a curve; a later one hides an earlier one
SYMBOL_STYLES = {"first": "bold", "part": "magenta", "mark": "bold magenta"}
HEAT = ("#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151")  # viridis, low to high
NUMBERS = 8  # columns of the numbers of an axis
DOT_ROWS, DOT_COLUMNS = 4, 2  # of a braille character
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # the bit of a dot, by column and row
BRAILLE = 0x2800
LOGARITHMIC = 10.0  # the largest over the smallest value from which an axis is logarithmic
Pairs = Sequence[tuple[float, float]]  # steps and values
Span = tuple[float, float]  # the steps at the left and at the right end


@dataclass(frozen=True)
class Axis:
    """The range of a chart's values; logarithmic where they span a factor of ten or more."""

    low: float
    high: float
    is_log: bool = False

    def place_values(self, values: np.ndarray) -> np.ndarray:
        """Where values lie between the ends, 0 to 1."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        scaled = np.log(values) if self.is_log else values
        return np.full(len(values), 0.5) if high <= low else np.clip((scaled - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class Points:
    """Values at steps, (points,) each; those that are not finite are not drawn."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def from_pairs(cls, pairs: Pairs) -> Points:
        steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
        return cls(steps, values)

    @property
    def finite(self) -> Points:
        kept = np.isfinite(self.values)
        return Points(self.steps[kept], self.values[kept])


NO_POINTS = Points(np.zeros(0), np.zeros(0))


def format_end(value: float) -> str:
    """A number at the end of an axis, in at most seven characters: '9.85', '1,234', '1.2e-05'."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 100_000 else f"{value:.3g}"
    return text if len(text) <= NUMBERS - 1 else f"{value:.0e}"


@dataclass(frozen=True)
class Curves:
    """What a chart shows: a curve, and over it points by the name of their symbol."""

    curve: Points
    points: Mapping[str, Points]

    @property
    def axis(self) -> Axis | None:
        """The axis on which all finite values fit; None without any."""
        values = np.concatenate([each.finite.values for each in (self.curve, *self.points.values())])
        if not len(values):
            return None
        low, high = float(values.min()), float(values.max())
        return Axis(low, high, is_log=low > 0 and high / low >= LOGARITHMIC)

    @property
    def span(self) -> Span:
        """The first and the last measured step."""
        steps = np.concatenate([each.steps for each in (self.curve, *self.points.values())])
        return float(steps.min()), float(steps.max())


def draw_chart(curves: Curves, size: tuple[int, int]) -> list[Text]:
    """The chart, with numbers at the ends of both axes: the largest and smallest value, the first and last step.

    Each column of dots covers what was measured of the curve in its steps, from the least to the most; it is bright at
    their mean.

    Args:
        size: columns and lines, in characters.
    """
    columns, lines = size[0] - NUMBERS, size[1] - 1
    axis = curves.axis
    if axis is None or columns < 4 or lines < 1:
        return [Text.assemble(("nothing measured yet", DIM))]
    ends = {0: format_end(axis.high), lines - 1: format_end(axis.low)}
    drawn = [
        Text.assemble((f"{ends.get(i, ''):>{NUMBERS - 1}} ", DIM), line)
        for i, line in enumerate(_draw_lines(curves, axis, (columns, lines)))
    ]
    return [*drawn, label_steps(NUMBERS, columns, *curves.span)]


def _draw_lines(curves: Curves, axis: Axis, size: tuple[int, int]) -> list[Text]:
    columns, lines = size
    grid = _collect_dots(curves.curve.finite, axis, curves.span, size)
    symbols: list[dict[int, str]] = [{} for _ in range(lines)]
    for name in SYMBOLS:
        points = curves.points.get(name, NO_POINTS).finite
        across = _scale(_place_steps(points.steps, curves.span), columns)
        down = _scale(1 - axis.place_values(points.values), lines)
        for line, column in zip(down.tolist(), across.tolist(), strict=True):
            symbols[line][column] = name
    rows = zip(grid.bits.tolist(), grid.is_mean.tolist(), symbols, strict=True)
    return [_write_line(bits, is_mean, found) for bits, is_mean, found in rows]


def _place_steps(steps: np.ndarray, span: Span) -> np.ndarray:
    return np.clip((steps - span[0]) / max(span[1] - span[0], 1e-9), 0.0, 1.0)


def _scale(places: np.ndarray, count: int) -> np.ndarray:
    """Places from 0 to 1 as indices below `count`."""
    return np.round(places * (count - 1)).astype(int)


@dataclass(frozen=True)
class DotGrid:
    """The braille bits of each character of a chart, (lines, columns), and which of them lie on the mean."""

    bits: np.ndarray
    is_mean: np.ndarray


def _collect_dots(curve: Points, axis: Axis, span: Span, size: tuple[int, int]) -> DotGrid:
    """Each column of dots from the least to the most of its values, and through their mean. Steps must rise."""
    columns, lines = size
    grid = DotGrid(np.zeros((lines, columns), dtype=int), np.zeros((lines, columns), dtype=bool))
    across = _scale(_place_steps(curve.steps, span), columns * DOT_COLUMNS)
    used, starts, counts = np.unique(across, return_index=True, return_counts=True)
    if not len(used):
        return grid
    low, high = (extreme.reduceat(curve.values, starts) for extreme in (np.minimum, np.maximum))
    mean = np.add.reduceat(curve.values, starts) / counts
    top, middle, bottom = (_scale(1 - axis.place_values(each), lines * DOT_ROWS).tolist() for each in (high, mean, low))
    for i, column in enumerate(used.tolist()):
        for row in range(top[i], bottom[i] + 1):
            grid.bits[row // DOT_ROWS, column // DOT_COLUMNS] |= DOTS[column % DOT_COLUMNS][row % DOT_ROWS]
        grid.is_mean[middle[i] // DOT_ROWS, column // DOT_COLUMNS] = True
    return grid


def _write_line(bits: Sequence[int], is_mean: Sequence[bool], symbols: Mapping[int, str]) -> Text:
    """A line of a chart: braille characters, bright where the mean is, and symbols in place of some."""
    characters = [chr(BRAILLE + dots) if dots else " " for dots in bits]
    styles = [ACCENT if bright else DIM for bright in is_mean]
    for column, name in symbols.items():
        characters[column], styles[column] = SYMBOLS[name], SYMBOL_STYLES[name]
    line, start = Text(), 0
    for style, run in groupby(styles):
        count = len(list(run))
        line.append("".join(characters[start : start + count]), style)
        start += count
    return line


def draw_heat_map(names: Sequence[str], steps: Sequence[int], values: np.ndarray, size: tuple[int, int]) -> list[Text]:
    """A line for each row of `values` (rows, steps), a character for each measured step; then the first and last step.

    Where there are more steps than columns, some of them are drawn, evenly; more rows than lines are joined, of which
    the largest value is drawn. What is not finite is left empty.
    """
    columns, lines = size
    names, values = thin_rows(names, np.where(np.isfinite(values), values, np.nan), lines - 1, join=np.fmax)
    gutter = max(map(len, names), default=0) + 1
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), max(2, columns - gutter))).round().astype(int))
    largest = float(np.fmax.reduce(values, axis=None, initial=0.0)) or 1.0
    drawn = [
        Text.assemble((f"{name:>{gutter - 1}} ", DIM), *draw_cells((row[kept] / largest).tolist()))
        for name, row in zip(names, values, strict=True)
    ]
    return [*drawn, label_steps(gutter, len(kept), steps[kept[0]], steps[kept[-1]])]


def draw_cells(shares: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Cells of a heat map with their styles, for shares of the largest value; neighbors that look alike are one text.

    The height of a cell tells its level, too, where a terminal has no colors.
    """
    levels = [-1 if not math.isfinite(each) else round(min(1.0, max(0.0, each)) * (len(HEAT) - 1)) for each in shares]
    for level, run in groupby(levels):
        yield (BLOCKS[level] if level >= 0 else " ") * len(list(run)), HEAT[level] if level >= 0 else ""


def label_steps(gutter: int, columns: int, first: float, last: float) -> Text:
    """The axis below a chart: its first and its last step."""
    left, right = f"{first:,.0f}", f"{last:,.0f}"
    if first == last:
        return Text.assemble((" " * gutter + left, DIM))
    space = max(1, columns - len(left) - len(right))
    return Text.assemble((" " * gutter + left + " " * space + right, DIM))
