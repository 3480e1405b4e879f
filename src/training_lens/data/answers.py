"""Read the answer of a row: messages, tool calls, text, or any JSON value as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training_lens.data.examples import Message, Row
from training_lens.data.messages import is_chat, read_chat
from training_lens.data.row_keys import KeyCheck, plain_name
from training_lens.data.tool_calls import Tool, find_calls, read_call
from training_lens.data.values import describe_plural, look_up_value, no_text_error, require_encodable, write_value
from training_lens.errors import DatasetError

# SQuAD records hold answers with their offsets in the context.
MARKED_ANSWER = ("text", "answer_start")


def read_answers(row: Row, key: str, tools: Sequence[Tool], keys: KeyCheck) -> tuple[tuple[Message, ...], bool]:
    """The messages after a row's prompt, and whether any of them carries a loss mask.

    Args:
        tools: the row's tools; an answer that calls them is learned as calls.

    Raises:
        DatasetError: there is nothing to learn; names row and key.
    """
    value = look_up_value(row.values, key)
    if is_chat(value):
        return read_chat(row, key, value, keys)
    if calls := find_calls(value, tools):
        keys.add_remark(f"answers in '{key}' that are calls of the row's tools are learned as calls")
        read = tuple(read_call(f"{row.place}, '{key}'", call, keys, f"{key}[].") for call in calls)
        return (Message("assistant", "", calls=read, null_content=True),), False
    return (Message("assistant", _read_answer_text(row, key, value, keys)),), False


def _read_answer_text(row: Row, key: str, value: Any, keys: KeyCheck) -> str:
    if not isinstance(value, str):
        value = _extract_answer(row, key, value, keys)
    if isinstance(value, str):
        if not value.strip():
            raise no_text_error(row, key, value)
        return require_encodable(f"{row.place}: '{key}'", value)
    written = write_value(value)
    if written is None:
        raise no_text_error(row, key, value)
    keys.add_remark(f"answers in '{key}' that are {describe_plural(value)} are learned as text", written)
    return require_encodable(f"{row.place}: '{key}'", written)


def _extract_answer(row: Row, key: str, value: Any, keys: KeyCheck) -> Any:
    """The first text of a SQuAD answer; any other value unchanged."""
    if _is_squad_answer(value):
        return _take_first_answer(row, key, value["text"], [value], keys)
    if isinstance(value, list) and value and all(map(_is_squad_answer, value)):
        return _take_first_answer(row, key, [answer["text"] for answer in value], value, keys)
    if value == [] and plain_name(key) == "answers":
        raise _no_answer_error(row, key)
    return value


def _is_squad_answer(value: Any) -> bool:
    return isinstance(value, Mapping) and all(name in value for name in MARKED_ANSWER)


def _take_first_answer(row: Row, key: str, texts: Any, records: Sequence[Mapping[str, Any]], keys: KeyCheck) -> Any:
    """The first answer of a SQuAD record."""
    for name in (name for record in records for name in record if name not in MARKED_ANSWER):
        keys.count_unused(f"{key}.{name}")
    keys.add_remark(f"of the answers in '{key}' the first text is learned; its place (answer_start) is not used")
    if isinstance(texts, list) and not texts:
        raise _no_answer_error(row, key)
    return texts[0] if isinstance(texts, list) else texts


def _no_answer_error(row: Row, key: str) -> DatasetError:
    return DatasetError(
        f"{row.place}: '{key}' holds no answer, SQuAD's way to say that there is none. Write the answer that the model "
        "should give, or leave such rows out with data.on_bad_row=skip."
    )
