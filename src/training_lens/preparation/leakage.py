"""Rows of one split that another split has, too: what is measured on them says nothing of new rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.preparation.deduplication import NearIndex, Rows, find_first_equal

LeakKind = Literal["exact", "prompt", "near"]
LEAK_KINDS: tuple[LeakKind, ...] = ("exact", "prompt", "near")
DROPPED = -1  # stands for a split in arrays of splits: rows that are in none


@dataclass(frozen=True, slots=True)
class Leak:
    """Two positions of rows in different splits: `row` and the `other` that it repeats.

    `kind`: exact says the same, prompt asks the same and is answered otherwise, near says nearly the same.
    """

    kind: LeakKind
    row: int
    other: int
    similarity: float


def find_equal_leaks(whole: np.ndarray, prompt: np.ndarray, split: np.ndarray, train: int) -> list[Leak]:
    """Every row that a split before its own repeats, in whole or in its prompt; training counts as the last split.

    Args:
        whole, prompt: (rows,) uint64, as in `deduplication.Fingerprint`.
        split: (rows,) index of each row's split, or `DROPPED`.
        train: the index of the training split.

    Returns:
        One leak a row, the stronger kind, in the order of the rows.
    """
    exact = _find_partners(whole, split, train)
    found = {row: Leak("prompt", row, other, 1.0) for row, other in _find_partners(prompt, split, train).items()}
    found |= {row: Leak("exact", row, other, 1.0) for row, other in exact.items()}
    return [found[row] for row in sorted(found)]


def _find_partners(digests: np.ndarray, split: np.ndarray, train: int) -> dict[int, int]:
    """Each row of which the digest first shows in another split, and the first row that has it."""
    rank = np.where(split == train, split.max(initial=0) + 1, split)
    order = np.lexsort((np.arange(len(split)), rank))
    order = order[split[order] != DROPPED]
    partner = order[find_first_equal(digests[order])]
    other = split[partner] != split[order]
    return dict(zip(order[other].tolist(), partner[other].tolist(), strict=True))


def find_near_leaks(rows: Rows, split: np.ndarray, train: int, index: NearIndex) -> list[Leak]:
    """Every row that is near one of another split; rows are read twice, held-out ones are kept in the (empty) index.

    Args:
        split: (rows,) index of each row's split, or `DROPPED`: such rows are passed over.
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
