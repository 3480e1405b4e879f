"""Leaks: rows of one split that another split repeats, so that metrics on them do not measure generalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.preparation.deduplication import NearIndex, Rows, find_first_equal

LeakKind = Literal["exact", "prompt", "near"]
LEAK_KINDS: tuple[LeakKind, ...] = ("exact", "prompt", "near")
DROPPED = -1  # split index of rows that are in no split


@dataclass(frozen=True, slots=True)
class Leak:
    """Two positions of rows in different splits: `row` and the `other` that it repeats.

    `kind`: exact (all equal), prompt (equal prompt, different answer), near (similar).
    """

    kind: LeakKind
    row: int
    other: int
    similarity: float


def find_equal_leaks(whole: np.ndarray, prompt: np.ndarray, split: np.ndarray, train: int) -> list[Leak]:
    """Rows that an earlier split repeats, in whole or in their prompt; training counts as the last split.

    Args:
        whole, prompt: (rows,) uint64, as in `deduplication.Fingerprint`.
        split: (rows,) index of each row's split, or `DROPPED`.
        train: the index of the training split.

    Returns:
        One leak per row, the stronger kind, in row order.
    """
    exact = _find_partners(whole, split, train)
    found = {row: Leak("prompt", row, other, 1.0) for row, other in _find_partners(prompt, split, train).items()}
    found |= {row: Leak("exact", row, other, 1.0) for row, other in exact.items()}
    return [found[row] for row in sorted(found)]


def _find_partners(digests: np.ndarray, split: np.ndarray, train: int) -> dict[int, int]:
    """Rows whose digest first occurs in another split -> the first row with it."""
    rank = np.where(split == train, split.max(initial=0) + 1, split)
    order = np.lexsort((np.arange(len(split)), rank))
    order = order[split[order] != DROPPED]
    partner = order[find_first_equal(digests[order])]
    other = split[partner] != split[order]
    return dict(zip(order[other].tolist(), partner[other].tolist(), strict=True))


def find_near_leaks(rows: Rows, split: np.ndarray, train: int, index: NearIndex) -> list[Leak]:
    """Rows near a row of another split. Reads all rows twice; held-out rows are added to the (empty) index.

    Args:
        split: (rows,) index of each row's split, or `DROPPED`: such rows are skipped.
        train: the index of the training split.
    """
    leaks: list[Leak] = []
    for training in (False, True):
        for position, example, context in rows():
            if split[position] == DROPPED or (split[position] == train) != training:
                continue
            sketch = index.build_sketch(example, context)
            other = next((found for found in index.find_near_rows(sketch) if split[found[0]] != split[position]), None)
            if other:
                leaks.append(Leak("near", position, *other))
            if not training:
                index.add_row(position, sketch)
    return leaks
