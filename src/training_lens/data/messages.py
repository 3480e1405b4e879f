"""Read the chat or the answer of a row as messages: {role, content}, {from, value}, calls, text, or any JSON value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from training_lens.data.examples import Message, Role, Row, Turns
from training_lens.data.row_keys import EMPTY_VALUES, MESSAGE, PART, KeyCheck, ignore_option, is_near, plain_name
from training_lens.data.tool_calls import Tool, find_calls, read_call, read_calls, read_written_calls
from training_lens.data.values import (
    describe_plural,
    describe_value,
    look_up_value,
    no_text_error,
    parse_json,
    require_encodable,
    write_value,
)
from training_lens.errors import DatasetError
from training_lens.utils.formatting import did_you_mean

SPOKEN_AS: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "function_call", "tool_call"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLE_NAMES = {name: role for role, names in SPOKEN_AS.items() for name in names}
EXTRA = ("name", "tool_call_id")
# Roles of an assistant that calls tools (ShareGPT, ms-swift): the content is the call in JSON.
CALLING = ("function_call", "tool_call")
MARKED_ANSWER = ("text", "answer_start")  # SQuAD records hold answers with their offsets in the context
SPELLINGS = (("role", "content"), ("from", "value"))
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_chat(row: Row, key: str, value: Any, keys: KeyCheck) -> tuple[tuple[Message, ...], bool]:
    """The messages of a chat in any supported form, and whether any of them carries a loss mask.

    Args:
        value: the list under the row's `key`, its JSON text, or a single message.

    Raises:
        DatasetError: not a list of messages, an unknown role, or content that is not text; names the message.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(f"{row.place}: '{key}'", value, "a list of messages in JSON")
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list) and len(items) == 1 and isinstance(items[0], list):
        items = items[0]
    if not isinstance(items, list) or not items:
        raise DatasetError(f"{row.place}: '{key}' is {describe_value(value)}, expected a list of {{role, content}}.")
    if isinstance(items[0], list):
        raise DatasetError(f"{row.place}: '{key}' holds {len(items)} chats. Write a row for each.")
    place, path = f"{row.place}, '{key}' message", f"{key}[]."
    read = [_read_message(f"{place} {turn}", item, keys, path) for turn, item in enumerate(items, 1)]
    return tuple(message for message, _ in read), any(masked for _, masked in read)


def is_chat(value: Any) -> bool:
    """Whether a value looks like a message or a list of them; misspelt keys are refused later, by `read_chat`."""
    if isinstance(value, str):
        return False
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(map(_resembles_message, items))


def _resembles_message(item: Any) -> bool:
    if not isinstance(item, Mapping):
        return False
    named = item.get("role", item.get("from"))
    return (
        is_message(item)
        or (isinstance(named, str) and named.strip().lower() in ROLE_NAMES)
        or any(all(any(is_near(key, name) for key in item) for name in names) for names in SPELLINGS)
    )


def is_message(item: Mapping[str, Any]) -> bool:
    """Whether an object has the keys of a message, in either spelling."""
    if "role" in item:
        return "content" in item or bool(item.get("tool_calls") or item.get("function_call"))
    return "from" in item and "value" in item


def _read_message(place: str, item: Any, keys: KeyCheck, path: str) -> tuple[Message, bool]:
    """A message, and whether it carries a loss mask."""
    if not isinstance(item, Mapping):
        raise _no_message_error(place, item)
    if not is_message(item):
        item = {plain_name(key) if plain_name(key) in MESSAGE.names else key: item[key] for key in item}
    shape = keys.check_keys(place, MESSAGE, item, path)
    if not is_message(item):
        raise _no_message_error(place, item)
    name = str(_pick_spelling(place, item, "role", "from")).strip().lower()
    content = _pick_spelling(place, item, "content", "value")
    role = ROLE_NAMES.get(name)
    if role is None:
        hint = did_you_mean(name, ROLE_NAMES)
        raise DatasetError(f"{place}: role '{name}' is none of {', '.join(get_args(Role))}.{hint}")
    calls = read_written_calls(place, content, keys, path) if name in CALLING else read_calls(place, item, keys, path)
    if calls and role != "assistant":
        raise DatasetError(f"{place}: a {role} message calls a tool; only an assistant can.")
    wordless = name in CALLING or (calls and content in EMPTY_VALUES)
    text = "" if wordless else _read_content(place, role, content, keys, path)
    extra = {key: item[key] for key in EXTRA if item.get(key) not in EMPTY_VALUES}
    wrong = next((key for key, value in extra.items() if not isinstance(value, str | int)), None)
    if wrong:
        raise DatasetError(f"{place}: '{wrong}' is {describe_value(extra[wrong])}, expected text.")
    extra = {key: str(value) for key, value in extra.items()}
    mask = read_mask(place, item, shape.masks, path) if shape.masks else None
    if mask is False and role == "assistant":
        keys.add_remark(f"answers whose '{shape.masks[0]}' is 0 (or false) are shown and not learned")
    if mask and role != "assistant":
        raise DatasetError(f"{place}: '{shape.masks[0]}' is 1 on a {role} message; only an assistant's can be learned.")
    null = content is None and bool(calls)
    learn = mask is not False
    return Message(role, text, learn=learn, calls=calls, extra=extra, null_content=null), mask is not None


def _pick_spelling(place: str, item: Mapping[str, Any], name: str, other: str) -> Any:
    """The value under one of two spellings."""
    if item.get(name) is not None and item.get(other) is not None:
        raise DatasetError(f"{place}: has both '{name}' and '{other}'. Keep one.")
    return item[name] if item.get(name) is not None else item.get(other)


def _no_message_error(place: str, item: Any) -> DatasetError:
    found = f"one with {', '.join(map(str, item))}" if isinstance(item, Mapping) else describe_value(item)
    return DatasetError(f"{place}: expected an object with 'role' and 'content' (or 'from', 'value'), found {found}.")


def _read_content(place: str, role: Role, content: Any, keys: KeyCheck, path: str) -> str:
    """Text, the text parts of a content list ({"type": "text", "text": ...}), or a value as text.

    Only content of assistants and tools may be a value: they may answer in JSON.
    """
    may_be_value = role in ("assistant", "tool")
    if isinstance(content, list) and content and all(_is_part(part, may_be_value) for part in content):
        content = "".join(_read_part(place, part, keys, f"{path}content[].") for part in content)
    elif may_be_value and not isinstance(content, str):
        written = write_value(content)
        if written is not None:
            keys.add_remark(f"content given as {describe_plural(content)} is read as text", written)
            content = written
    if not isinstance(content, str) or not content:
        raise DatasetError(f"{place}: 'content' is {describe_value(content)}, expected text.")
    return require_encodable(f"{place}: 'content'", content)


def _is_part(value: Any, may_be_value: bool) -> bool:
    """Whether an object is a part of content; where content may be any value, only one with the keys of a part."""
    if not isinstance(value, Mapping):
        return False
    return not may_be_value or "type" in value or (bool(value) and value.keys() <= PART.names)


def _read_part(place: str, part: Mapping[str, Any], keys: KeyCheck, path: str) -> str:
    if part.get("type", "text") != "text":
        raise DatasetError(f"{place}: has a part of type '{part['type']}'; only text can be trained on.")
    keys.check_keys(f"{place}, a part of its content", PART, part, path)
    text = _pick_spelling(place, part, "text", "value")
    if not isinstance(text, str):
        raise DatasetError(f"{place}: the text of a part of its content is {describe_value(text)}, expected text.")
    return text


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
    if _is_squad_answer(value):
        value = _take_first_answer(row, key, value["text"], [value], keys)
    elif isinstance(value, list) and value and all(map(_is_squad_answer, value)):
        value = _take_first_answer(row, key, [answer["text"] for answer in value], value, keys)
    elif value == [] and plain_name(key) == "answers":
        raise _no_answer_error(row, key)
    if isinstance(value, str):
        if not value.strip():
            raise no_text_error(row, key, value)
        return require_encodable(f"{row.place}: '{key}'", value)
    written = write_value(value)
    if written is None:
        raise no_text_error(row, key, value)
    keys.add_remark(f"answers in '{key}' that are {describe_plural(value)} are learned as text", written)
    return require_encodable(f"{row.place}: '{key}'", written)


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
