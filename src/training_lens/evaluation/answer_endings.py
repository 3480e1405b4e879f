"""How generated answers end: whether the model ends them, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEAST_REPEATS, LEAST_LOOP_TOKENS, LONGEST_PERIOD = 4, 12, 64
SPARE_TOKENS = 16  # generated beyond the longest right answer; a longer answer is wrong anyway


@dataclass(frozen=True)
class Endings:
    """How the answers of one model end.

    `unended` were cut at twice the tokens of the right answer or later, or at 16 more than it has. `cut_short` were cut
    earlier, so whether they would end is unknown. `looping` repeat the same few tokens where the right answer does not.
    `room` is max_new_tokens, `longest` the tokens of the longest right answer.
    """

    answers: int
    unended: int
    cut_short: int
    looping: int
    room: int
    longest: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def has_loop(token_ids: Sequence[int] | np.ndarray) -> bool:
    """Whether a cycle of at most 64 tokens is repeated four times or more in a row, over at least 12 tokens.

    Example:
        >>> has_loop([5, 1, 2, 3] + [1, 2, 3] * 3), has_loop([1, 2, 3, 4] * 2)
        (True, False)
    """
    ids = np.asarray(token_ids)
    return any(
        _longest_run(ids[period:] == ids[:-period]) >= _least_matches(period) for period in _possible_periods(len(ids))
    )


def _possible_periods(length: int) -> range:
    return range(1, min(LONGEST_PERIOD, length // LEAST_REPEATS) + 1)


def _least_matches(period: int) -> int:
    """How many tokens in a row must equal those one period earlier."""
    return max(period * (LEAST_REPEATS - 1), LEAST_LOOP_TOKENS - period)


def _longest_run(equal: np.ndarray) -> int:
    """The longest run of true values in a (tokens,) bool array."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    return int((ends[1::2] - ends[::2]).max(initial=0))


def summarize_endings(
    token_ids: Sequence[Sequence[int]],
    is_cut: Sequence[bool],
    right: Sequence[Sequence[int] | np.ndarray],
    room: int,
) -> Endings:
    """How some answers end.

    Args:
        token_ids: the tokens of each answer, without the end token.
        is_cut: whether the answer reached the limit.
        right: the tokens of each right answer.
        room: max_new_tokens.
    """
    lengths = [len(ids) for ids in right]
    spare = [room >= min(2 * length, length + SPARE_TOKENS) for length in lengths]
    loops = [has_loop(given) and not has_loop(wanted) for given, wanted in zip(token_ids, right, strict=True)]
    unended = sum(cut and enough for cut, enough in zip(is_cut, spare, strict=True))
    return Endings(len(token_ids), unended, sum(is_cut) - unended, sum(loops), room, max(lengths, default=0))
