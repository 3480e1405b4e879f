"""Fewer cases than a full product has, among which any two values of two axes still meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(
    *axes: Sequence[Any], allowed: Callable[[tuple[Any, ...]], bool] = lambda row: True
) -> list[tuple[Any, ...]]:
    """Rows of one value per axis: every value of every axis is in one, and every pair of values of two axes.

    Takes the row of the full product that has the most pairs still missing, again and again; always the same rows.

    Args:
        allowed: whether a row is a case at all; pairs that only other rows have are left out.
    """

    def values(row: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(axis[i] for axis, i in zip(axes, row, strict=True))

    rows = [row for row in product(*(range(len(axis)) for axis in axes)) if allowed(values(row))]
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        chosen.append(values(best))
    return chosen


def _pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(row), 2))
