"""The text of a run's tokens piece by piece, such that the pieces together are the text of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.run_folder import RunFolder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_WAIT = 4  # pieces that may pass until a character is complete: it has at most four bytes, each a token


def read_saved_rules(run: RunFolder) -> Any:
    """The rules of the tokenizer that a finished run saved; None for one that has saved none yet.

    Raises:
        CheckpointError: its file is damaged.
    """
    from tokenizers import Tokenizer

    from training_lens.utils.integrity import require_intact

    file = run.tokenizer / "tokenizer.json"
    if not file.is_file():
        return None
    require_intact(run.tokenizer)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the class that tokenizers raises
        raise CheckpointError(f"{file} cannot be read as a tokenizer ({error}). Restore it.") from error


def load_run_tokenizer(run: RunFolder) -> Any:
    """The tokenizer that a run saved, or its model's while it trains; nothing is fetched from a hub.

    Raises:
        ConfigurationError: it carries code that the user has not allowed, or is not on this machine.
    """
    from training_lens.config.run_config import MODEL_CODE, open_run_config
    from training_lens.models.factory import load_tokenizer
    from training_lens.models.location import local_folder

    config = open_run_config(run, {}, MODEL_CODE)
    model = config.model
    if run.tokenizer.is_dir():
        return load_tokenizer(model, str(run.tokenizer))
    folder = local_folder(model)  # a run that trains has saved none yet
    if folder is None:
        raise ConfigurationError(
            f"model.id: '{model.id}' is not on this machine, so its tokens cannot be read as text."
        )
    return load_tokenizer(model.model_copy(update={"id": str(folder)}), new_tokens=config.data.new_tokens)


def build_decode(rules: Any) -> Callable[[Sequence[int]], str]:
    """Tokens to text with a tokenizer's rules (`tokenizers.Tokenizer`); special tokens are shown, spaces stay."""
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
