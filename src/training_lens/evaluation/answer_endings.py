"""How generated answers end: whether the model ends them, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def has_loop(token_ids: Sequence[int] | np.ndarray) -> bool:
    """Whether a cycle of at most 64 tokens is repeated four times or more in a row, over at least 12 tokens.

    Example:
        >>> has_loop([5, 1, 2, 3] + [1, 2, 3] * 3), has_loop([1, 2, 3, 4] * 2)
        (True, False)
    """
    ids = np.asarray(token_ids)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // LEAST_REPEATS) + 1):
        equal = np.concatenate([[False], ids[period:] == ids[:-period], [False]])  # to the token one period earlier
        ends = np.flatnonzero(np.diff(equal.astype(np.int8)))  # where runs of equal tokens start and end, in turn
        longest = (ends[1::2] - ends[::2]).max(initial=0)
        if longest >= max(period * (LEAST_REPEATS - 1), LEAST_LOOP_TOKENS - period):
            return True
    return False


def summarize_endings(
    token_ids: Sequence[Sequence[int]], is_cut: Sequence[bool], right: Sequence[Sequence[int] | np.ndarray], room: int
) -> Endings:
    """How answers of these tokens (without the end token) end; `right` are the tokens of the right ones."""
    lengths = [len(ids) for ids in right]
    spare = [room >= min(2 * length, length + SPARE_TOKENS) for length in lengths]
    loops = [has_loop(given) and not has_loop(wanted) for given, wanted in zip(token_ids, right, strict=True)]
    unended = sum(cut and enough for cut, enough in zip(is_cut, spare, strict=True))
    return Endings(len(token_ids), unended, sum(is_cut) - unended, sum(loops), room, max(lengths, default=0))
