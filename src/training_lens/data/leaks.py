"""Held-out rows that training rows repeat, by how they are alike: each row counts once, as its strongest kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.data.near_rows import find_near_rows
from training_lens.data.row_identity import find_first_match, find_same_questions, find_same_rows
from training_lens.data.token_dataset import TokenDataset

LeakKind = Literal["exact", "normalized", "question", "near"]
LEAK_KINDS: tuple[LeakKind, ...] = ("exact", "normalized", "question", "near")
LEAK_TEXTS: dict[str, str] = {
    "exact": "equal but for white space",
    "normalized": "equal but for case, punctuation or a few leading words",
    "question": "the same question with another answer",
    "near": "nearly the same text",
}
NO_LEAK = -1


@dataclass(frozen=True)
class SplitLeaks:
    """`kinds` (held-out rows,): index into `LEAK_KINDS`, or `NO_LEAK`; `partners`: the position of the training row."""

    kinds: np.ndarray
    partners: np.ndarray

    @property
    def is_leaked(self) -> np.ndarray:
        """Which held-out rows leak, (rows,) bool."""
        found: np.ndarray = self.kinds != NO_LEAK
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Leaking rows by kind."""
        return {kind: int((self.kinds == index).sum()) for index, kind in enumerate(LEAK_KINDS)}

    def describe(self) -> str:
        """The kinds that occur, with their rows: '16 equal but for white space, 3 nearly the same text'."""
        return ", ".join(f"{count:,} {LEAK_TEXTS[kind]}" for kind, count in self.counts.items() if count)


def find_leaks(train: TokenDataset, held_out: TokenDataset) -> SplitLeaks:
    """The held-out rows that training rows repeat. Domains do not matter: the same text of another domain is a leak.

    Raises:
        DatasetError: an earlier version wrote the tokens, without hashes of questions.
    """
    known, asked = train.identities, held_out.identities
    partners = {
        "exact": find_first_match(train.digests, held_out.digests),
        "normalized": find_same_rows(known, asked),
        "question": find_same_questions(known, asked),
        "near": find_near_rows(train, held_out),
    }
    kinds, others = np.full(len(held_out), NO_LEAK), np.full(len(held_out), NO_LEAK)
    for index, kind in reversed(list(enumerate(LEAK_KINDS))):  # the strongest is written last
        found = partners[kind] >= 0
        kinds[found], others[found] = index, partners[kind][found]
    return SplitLeaks(kinds, others)
