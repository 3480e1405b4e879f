"""Read the chat of a row, {role, content} or {from, value}, as messages with calls and loss masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from training_lens.data.examples import Message, Role, Row
from training_lens.data.masks import read_mask
from training_lens.data.row_keys import EMPTY_VALUES, MESSAGE, PART, KeyCheck, is_near, plain_name
from training_lens.data.tool_calls import read_calls, read_written_calls
from training_lens.data.values import describe_plural, describe_value, parse_json, require_encodable, write_value
from training_lens.errors import DatasetError
from training_lens.utils.formatting import nearest_name

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
EXTRA = ("name", "tool_call_id")
# Roles of an assistant that calls tools (ShareGPT, ms-swift): the content is the call in JSON.
CALLING = ("function_call", "tool_call")
SPELLINGS = (("role", "content"), ("from", "value"))


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
    return bool(items) and all(isinstance(item, Mapping) and _resembles_message(item) for item in items)


def _resembles_message(item: Mapping[str, Any]) -> bool:
    named = item.get("role", item.get("from"))
    return (
        is_message(item)
        or (isinstance(named, str) and named.strip().lower() in ROLE_NAMES)
        or any(all(any(is_near(key, name) for key in item) for name in names) for names in SPELLINGS)
    )


def is_message(item: Mapping[str, Any]) -> bool:
    """Whether an object has the keys of a message, in either spelling."""
    if "role" in item:
        return "content" in item or _has_calls(item)
    return "from" in item and "value" in item


def _has_calls(item: Mapping[str, Any]) -> bool:
    return bool(item.get("tool_calls") or item.get("function_call"))


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
        close = nearest_name(name, ROLE_NAMES)
        hint = f" Did you mean '{close}'?" if close else ""
        raise DatasetError(f"{place}: role '{name}' is none of {', '.join(get_args(Role))}.{hint}")
    calls = read_written_calls(place, content, keys, path) if name in CALLING else read_calls(place, item, keys, path)
    if calls and role != "assistant":
        raise DatasetError(f"{place}: a {role} message calls a tool; only an assistant can.")
    wordless = name in CALLING or (calls and content in EMPTY_VALUES)
    text = "" if wordless else _read_content(place, role, content, keys, path)
    extra = {key: item[key] for key in EXTRA if item.get(key)}
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
    if isinstance(content, str) and content:
        return require_encodable(f"{place}: 'content'", content)
    may_be_value = role in ("assistant", "tool")
    is_part = _is_part if may_be_value else _is_object
    if isinstance(content, list) and content and all(map(is_part, content)):
        content = "".join(_read_part(place, part, keys, f"{path}content[].") for part in content)
    elif may_be_value and not isinstance(content, str):
        written = write_value(content)
        if written is not None:
            keys.add_remark(f"content given as {describe_plural(content)} is read as text", written)
            content = written
    if not isinstance(content, str) or not content:
        raise DatasetError(f"{place}: 'content' is {describe_value(content)}, expected text.")
    return require_encodable(f"{place}: 'content'", content)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and ("type" in value or (bool(value) and value.keys() <= PART.names))


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _read_part(place: str, part: Mapping[str, Any], keys: KeyCheck, path: str) -> str:
    if part.get("type", "text") != "text":
        raise DatasetError(f"{place}: has a part of type '{part['type']}'; only text can be trained on.")
    keys.check_keys(f"{place}, a part of its content", PART, part, path)
    text = _pick_spelling(place, part, "text", "value")
    if not isinstance(text, str):
        raise DatasetError(f"{place}: the text of a part of its content is {describe_value(text)}, expected text.")
    return text
