"""The text of tokens piece by piece, such that the pieces together are the text of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_WAIT = 4  # pieces that may pass until a character is complete: it has at most four bytes, each a token


def build_decode(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Tokens to text with the tokenizer's own rules alone; special tokens are shown, spaces stay as they are."""
    rules = tokenizer.backend_tokenizer
    return lambda ids: str(rules.decode(ids, skip_special_tokens=False))


def decode_pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int], ends: Sequence[int]) -> list[str]:
    """The text of the tokens up to each of `ends`, without that of the pieces before.

    A character whose tokens lie in several pieces belongs to the one that completes it. Each piece is decoded behind
    the one before, because tokenizers drop a space at the front. Cost: each token is decoded about three times.

    Args:
        ends: ascending; the last is the number of tokens.
    """
    pieces: list[str] = []
    start, whole, shown, waited = 0, 0, 0, 0  # window's first token, end of the last whole piece, characters given
    for end in ends:
        text = decode(ids[start:end])
        if text.endswith(REPLACEMENT) and end < len(ids) and waited < LONGEST_WAIT:
            complete, waited = text.rstrip(REPLACEMENT), waited + 1
            pieces.append(complete[shown:])
            shown = max(shown, len(complete))
            continue
        pieces.append(text[shown:])
        start, whole, waited = whole, end, 0
        shown = len(decode(ids[start:end]))
    return pieces


def find_mark_ends(marks: np.ndarray) -> list[int]:
    """Where each run of equal marks ends; nothing for no marks.

    Example:
        >>> find_mark_ends(np.array([False, False, True, True, False]))
        [2, 4, 5]
    """
    return [*(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)] if len(marks) else []
