"""Downsampling of long runs for charts that keeps the extremes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

MOST_POINTS = 1000  # of a line: more than a screen has columns
MOST_STEPS, MOST_ROWS = 400, 64  # of a heat map


def thin_line(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a line: its ends, and the lowest and highest point of equal parts.

    Both are (points,). A part with values that are not finite keeps the first of them in place of its lowest.
    """
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), (most - 2) // 2 + 1).astype(int).tolist()
    parts = [range(start, end) for start, end in pairwise(edges)]
    kept = {0, len(steps) - 1}
    for part in parts:
        inside = values[part.start : part.stop]
        is_finite = np.isfinite(inside)
        lowest = inside.argmin() if is_finite.all() else is_finite.argmin()  # else the first that is not finite
        kept |= {part.start + int(lowest), part.start + int(np.where(is_finite, inside, -np.inf).argmax())}
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]


def thin_steps(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_STEPS` columns, each the maximum of equally many neighboring steps (NaN if one of them is NaN).

    `values` is (rows, steps). A column is labelled with the last of its steps.
    """
    if len(steps) <= MOST_STEPS:
        return steps, values
    starts = np.linspace(0, len(steps), MOST_STEPS, endpoint=False).astype(int)
    ends = np.append(starts[1:], len(steps)) - 1
    return steps[ends], np.maximum.reduceat(values, starts, axis=1)


def thin_rows(
    names: Sequence[str], values: np.ndarray, most: int = MOST_ROWS, join: np.ufunc = np.maximum
) -> tuple[tuple[str, ...], np.ndarray]:
    """At most `most` rows of (rows, steps), each the maximum of neighbors and named by the first and last.

    Args:
        join: `np.fmax` leaves out what is NaN; by default one NaN makes the row's value NaN.
    """
    if len(names) <= most:
        return tuple(names), values
    starts = np.linspace(0, len(names), most, endpoint=False).astype(int)
    ends = np.append(starts[1:], len(names)) - 1
    joined = [names[s] if s == e else f"{names[s]}-{names[e]}" for s, e in zip(starts, ends, strict=True)]
    return tuple(joined), join.reduceat(values, starts, axis=0)
