"""Held-out rows that training rows repeat, by how they are alike: each row counts once, as its strongest kind.

Near rows are found on their tokens, as exact counts of all pairs. A row is the set of its 5-token pieces. Pieces that
many rows share are a template's and say nothing, so they are left out. Two rows are near if they share 80 % of the
other pieces (Jaccard similarity). Cost: linear in tokens, numpy alone. Beyond `MOST_TOKENS` a fixed part of the pieces
is compared, chosen by their hash (Broder: On the resemblance and containment of documents, 1997, section 4), which
estimates the same similarity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.data.columns import EncodedRows, compute_offsets
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
PIECE = 5  # tokens
THRESHOLD = 0.8
FEWEST_PIECES = 8  # of a row that is compared
MOST_ROWS, MOST_SHARE, LEAST_ROWS = 50, 0.1, 3  # training rows that may share a piece: more, and it is a template's
MOST_TOKENS = 20_000_000
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i + 1, 2**64) for i in range(PIECE)], dtype=np.uint64)


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


@dataclass(frozen=True)
class _HeldOutPieces:
    """The distinct pieces of the held-out rows, sorted; piece i is in the rows[starts[i]:starts[i + 1]]."""

    values: np.ndarray
    starts: np.ndarray
    rows: np.ndarray

    def locate(self, pieces: np.ndarray) -> np.ndarray:
        """The index of each piece in `values`; -1 if it is not there."""
        place = np.minimum(np.searchsorted(self.values, pieces), len(self.values) - 1)
        return np.where(self.values[place] == pieces, place, -1)


def find_near_rows(train: TokenDataset, held_out: TokenDataset) -> np.ndarray:
    """For each held-out row, the most similar near training row; -1 if none is near."""
    mine, theirs, similar = _find_near_pairs(train, held_out)
    found = np.full(len(held_out), -1, dtype=np.int64)
    order = np.argsort(similar, kind="stable")  # the most similar is written last
    found[mine[order]] = theirs[order]
    return found


def find_near_repeats(dataset: TokenDataset) -> np.ndarray:
    """The pairs of rows of one data set that nearly repeat each other, (pairs, 2), each pair once."""
    mine, theirs, _ = _find_near_pairs(dataset, dataset)
    return np.stack([mine, theirs], 1)[mine < theirs]


def _find_near_pairs(train: TokenDataset, held_out: TokenDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The near pairs: held-out row, training row, and their similarity."""
    every = 1 + int(train.lengths.sum()) // MOST_TOKENS
    asked_rows, asked_pieces = _concatenate(_iterate_pieces(held_out, every))
    if not len(asked_pieces):
        return (nothing := np.zeros(0, dtype=np.int64)), nothing, np.zeros(0)
    order = np.argsort(asked_pieces, kind="stable")
    values, counts = np.unique_counts(asked_pieces)
    index = _HeldOutPieces(values, compute_offsets(counts), asked_rows[order])
    sizes = np.zeros(len(train), dtype=np.int64)  # pieces of each training row that are no template's
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for rows, pieces in _iterate_pieces(train, every):
        place = index.locate(pieces)
        sizes += np.bincount(rows, minlength=len(train))
        kept.append((rows[place >= 0], place[place >= 0]))
    known_rows, places = _concatenate(kept)
    most = min(MOST_ROWS, max(LEAST_ROWS, MOST_SHARE * len(train)))
    common = np.bincount(places, minlength=len(values)) > most
    sizes -= np.bincount(known_rows[common[places]], minlength=len(train))
    rare = ~common[places]
    own = np.bincount(asked_rows[~common[index.locate(asked_pieces)]], minlength=len(held_out))
    pairs, shared = _count_shared(index, known_rows[rare], places[rare], len(train))
    mine, theirs = pairs // len(train), pairs % len(train)
    similar = shared / (own[mine] + sizes[theirs] - shared)
    is_near = (similar >= THRESHOLD) & (own[mine] >= FEWEST_PIECES) & (sizes[theirs] >= FEWEST_PIECES)
    return mine[is_near], theirs[is_near], similar[is_near]


def _count_shared(
    index: _HeldOutPieces, rows: np.ndarray, places: np.ndarray, known: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (held-out row * known + training row) that share pieces, and how many each shares."""
    counts = np.diff(index.starts)[places]
    starts = np.repeat(index.starts[:-1][places] - compute_offsets(counts)[:-1], counts)
    mine = index.rows[starts + np.arange(len(starts))]
    pairs: tuple[np.ndarray, np.ndarray] = np.unique_counts(mine * known + np.repeat(rows, counts))
    return pairs


def _iterate_pieces(dataset: TokenDataset, every: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of rows and the hashes of their pieces, each piece once a row, chunk by chunk."""
    for positions, rows in dataset.iterate_columns():
        place, pieces = hash_pieces(rows)
        chosen = pieces % np.uint64(every) == 0 if every > 1 else np.ones(len(pieces), dtype=bool)
        place, pieces = place[chosen], pieces[chosen]
        _, first = np.unique(pieces ^ (place.astype(np.uint64) * _POWERS[-1]), return_index=True)
        yield positions[place[first]], pieces[first]


def hash_pieces(rows: EncodedRows) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every `PIECE` consecutive tokens of a row, uint64, and the row of each; shorter rows have none."""
    ids, lengths = rows.input_ids.astype(np.uint64), rows.lengths
    windows = max(0, len(ids) - PIECE + 1)
    hashes = np.zeros(windows, dtype=np.uint64)
    for shift, power in enumerate(_POWERS.tolist()):
        hashes += (ids[shift : shift + windows] + np.uint64(1)) * np.uint64(power)
    row = np.repeat(np.arange(len(rows)), lengths)[:windows]
    is_inside = np.arange(windows) + PIECE <= rows.offsets[1:][row]
    hashes = hashes[is_inside]
    return row[is_inside], hashes ^ (hashes >> np.uint64(29))


def _concatenate(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    rows, values = zip(*parts, strict=True)
    return [np.concatenate(rows), np.concatenate(values)]
