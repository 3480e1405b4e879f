"""Tokens of many examples as columns, and the operations on all of them at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.data.examples import TokenizedExample
from training_lens.data.row_identity import IDENTITY_COLUMNS, NO_IDENTITY

Truncation = Literal["keep_end", "keep_start", "drop"]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Tokens of one example, (length,) int32, and which of them belong to a response, (length,) bool."""

    input_ids: np.ndarray
    response: np.ndarray


@dataclass(frozen=True)
class EncodedRows:
    """Tokens of many examples, concatenated; example i has those from offsets[i] to offsets[i + 1].

    `input_ids` (tokens,) int32, `response` (tokens,) bool, `offsets` (examples + 1,) int64.
    """

    input_ids: np.ndarray
    response: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> EncodedRow:
        place = slice(*self.offsets[range(len(self))[index] :][:2])
        return EncodedRow(self.input_ids[place], self.response[place])

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (examples,) int64."""
        return np.diff(self.offsets)

    def select_tokens(self, kept: np.ndarray) -> EncodedRows:
        """Only the tokens where `kept` (tokens,) is true; the number of examples stays."""
        offsets = compute_offsets(count_by_example(kept, self.offsets))
        return EncodedRows(self.input_ids[kept], self.response[kept], offsets)

    def select_examples(self, chosen: np.ndarray) -> EncodedRows:
        """Only the examples where `chosen` (examples,) is true."""
        if chosen.all():
            return self
        kept = self.select_tokens(np.repeat(chosen, self.lengths))
        return EncodedRows(kept.input_ids, kept.response, compute_offsets(kept.lengths[chosen]))


def compute_offsets(lengths: np.ndarray) -> np.ndarray:
    """The offsets of consecutive pieces of these lengths, with the end of the last; int64.

    Example:
        >>> compute_offsets(np.array([2, 3])).tolist()
        [0, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def count_by_example(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The number of true `flags` between consecutive offsets, int64.

    Example:
        >>> count_by_example(np.array([True, False, True]), np.array([0, 0, 2, 3])).tolist()
        [0, 1, 1]
    """
    return np.diff(compute_offsets(flags)[offsets])


def truncate_rows(rows: EncodedRows, seq_len: int, truncation: Truncation, bos_id: int | None) -> EncodedRows:
    """Truncate examples to `seq_len` tokens; with `drop`, longer ones become empty.

    keep_end removes tokens after BOS, so the answer keeps its end token; keep_start removes the end, so the rest of
    the answer does not teach the model to stop.
    """
    lengths = rows.lengths
    if lengths.max(initial=0) <= seq_len:
        return rows
    place = np.arange(len(rows.input_ids)) - np.repeat(rows.offsets[:-1], lengths)
    length = np.repeat(lengths, lengths)
    short = length <= seq_len
    if truncation == "drop":
        return rows.select_tokens(short)
    if truncation == "keep_start":
        return rows.select_tokens(place < seq_len)
    has_bos = np.zeros(len(rows), dtype=np.int64)  # 1 for examples that begin with BOS
    filled = lengths > 0
    has_bos[filled] = rows.input_ids[rows.offsets[:-1][filled]] == (-1 if bos_id is None else bos_id)
    front = np.repeat(has_bos, lengths)
    return rows.select_tokens(short | (place < front) | (place >= length - (seq_len - front)))


def find_learnable_rows(rows: EncodedRows, special_ids: Collection[int]) -> np.ndarray:
    """Whether an answer has targets other than special tokens, (examples,) bool."""
    taught = mask_first_tokens(rows.response, rows.offsets) & ~np.isin(rows.input_ids, list(special_ids))
    found: np.ndarray = count_by_example(taught, rows.offsets) > 0
    return found


def mask_first_tokens(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """`flags` (tokens,) with each example's first token set to false: nothing predicts it."""
    targets = flags.copy()
    targets[offsets[:-1][np.diff(offsets) > 0]] = False
    return targets


@dataclass(frozen=True)
class TokenizedRows:
    """`TokenizedExample`s as columns: tokens concatenated as in `EncodedRows`, everything else one per example."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    files: Sequence[str]
    numbers: np.ndarray
    domains: Sequence[str | None]
    digests: np.ndarray
    identities: np.ndarray  # (examples, IDENTITY_COLUMNS) uint64

    @classmethod
    def from_examples(cls, examples: Sequence[TokenizedExample]) -> TokenizedRows:
        return cls(
            np.concatenate([np.array([], np.int32), *(e.input_ids for e in examples)]),
            np.concatenate([np.array([], bool), *(e.loss_mask for e in examples)]),
            compute_offsets(np.array([len(e.input_ids) for e in examples], dtype=np.int64)),
            [e.file for e in examples],
            np.array([e.row for e in examples], dtype=np.int64),
            [e.domain for e in examples],
            np.array([e.digest for e in examples], dtype=np.uint64),
            np.array([e.identity or NO_IDENTITY for e in examples], dtype=np.uint64).reshape(-1, IDENTITY_COLUMNS),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[TokenizedExample]:
        for i, (start, end) in enumerate(zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)):
            yield TokenizedExample(
                self.files[i],
                int(self.numbers[i]),
                self.input_ids[start:end],
                self.loss_mask[start:end],
                self.domains[i],
                int(self.digests[i]),
                tuple(self.identities[i].tolist()),
            )

    @property
    def supervised_counts(self) -> np.ndarray:
        """Targets of each example: tokens in the loss mask except the first; (examples,) int64."""
        return count_by_example(mask_first_tokens(self.loss_mask, self.offsets), self.offsets)
