"""Loss masks of messages and of whole rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from training_lens.data.examples import Message, Row, Turns
from training_lens.data.row_keys import ignore_option
from training_lens.data.values import describe_value
from training_lens.errors import DatasetError

FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_flag(value: Any) -> bool | None:
    """The bool in a bool, in 0 or 1, or in one of them as text; None for anything else."""
    return FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None


def read_mask(place: str, values: Mapping[str, Any], masks: Collection[str], path: str = "") -> bool | None:
    """Whether a message or row is learned, by its masks; None if they are empty.

    Args:
        masks: the mask keys in `values`.
        path: the path of those keys, as in `KeyCheck.check`.

    Raises:
        DatasetError: a mask is neither 0 nor 1, or two masks disagree.
    """
    flags = {key: _require_flag(place, path + key, values[key]) for key in masks if values[key] is not None}
    if len(set(flags.values())) > 1:
        raise DatasetError(
            f"{place}: {' and '.join(f'{key!r} is {values[key]!r}' for key in flags)}; they disagree on whether the "
            "answer is learned. Keep one."
        )
    return next(iter(flags.values()), None)


def _require_flag(place: str, path: str, value: Any) -> bool:
    flag = read_flag(value)
    if flag is None:
        found = repr(value) if isinstance(value, int | float | str) else describe_value(value)
        raise DatasetError(
            f"{place}: '{path.rsplit('.', 1)[-1]}' is {found}, expected 0 or 1: an answer is learned "
            "or not. Round it, or weigh whole files with data.weights. If it means something else: "
            f"{ignore_option(path)}."
        )
    return flag


def mask_row(row: Row, masks: tuple[str, ...], messages: Turns, masked_turns: bool) -> Turns:
    """Apply the row's masks to its messages: one mask for all answers, or a list with one per turn.

    Args:
        masks: the row's mask keys.
        masked_turns: whether messages have masks of their own.

    Raises:
        DatasetError: as `read_mask`; a list of the wrong length; masks of messages that disagree.
    """
    masks = tuple(key for key in masks if row.values.get(key) is not None)
    lists = [key for key in masks if isinstance(row.values[key], list)]
    if lists and len(masks) > 1:
        raise DatasetError(f"{row.place}: {' and '.join(masks)} each say what is learned. Keep one.")
    if lists:
        learn = _read_turn_masks(row, lists[0], messages)
    elif read_mask(row.place, row.values, masks) is not False:
        return messages
    else:
        learn = [False] * len(messages)
    if masked_turns and any(m.learn != flag for m, flag in zip(messages, learn, strict=True) if m.role == "assistant"):
        raise DatasetError(
            f"{row.place}: '{masks[0]}' and the masks of its messages disagree on what is learned. Keep one of them."
        )
    return mark_learned(messages, learn)


def mark_learned(messages: Sequence[Message], learn: Sequence[bool]) -> Turns:
    """The messages; an answer stays learned only where `learn` is true."""
    return tuple(
        replace(m, learn=False) if m.learn and not keep and m.role == "assistant" else m
        for m, keep in zip(messages, learn, strict=True)
    )


def _read_turn_masks(row: Row, key: str, messages: Sequence[Message]) -> list[bool]:
    """Whether each message is learned, from a list with one entry per message or per answer."""
    flags = [_require_flag(row.place, key, value) for value in row.values[key]]
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if len(flags) == len(messages):
        wrong = next((m.role for m, flag in zip(messages, flags, strict=True) if flag and m.role != "assistant"), None)
        if wrong:
            raise DatasetError(
                f"{row.place}: '{key}' is 1 on a {wrong} message; only an assistant's can be learned. Set it to 0."
            )
        return flags
    if len(flags) == len(answers):
        by_turn = dict(zip(answers, flags, strict=True))
        return [by_turn.get(i, False) for i in range(len(messages))]
    raise DatasetError(
        f"{row.place}: '{key}' has {len(flags)} entries for {len(messages)} messages with {len(answers)} answers; "
        "expected one for each message or for each answer. Masks of single tokens cannot be used."
    )
