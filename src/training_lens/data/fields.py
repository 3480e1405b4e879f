"""Rows to examples: which fields hold the prompt and the answer, found by looking or as configured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from training_lens.config.schema import DomainSection, FieldsSection
from training_lens.data.types import Example, Message, Role, Row
from training_lens.errors import DatasetError
from training_lens.utils.formatting import nearest

# What a field is commonly called. Where a file has two names of one line, the user must say which is meant.
ALIASES: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "question", "prompt", "query", "problem"),
    "input": ("input", "context"),
    "output": ("output", "answer", "response", "completion", "solution"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation"),
    "tools": ("tools",),
    "text": ("text",),
}
# The forms that rows have, the meanings that each knows, and the one that chooses it.
MEANINGS = {
    "messages": ("messages", "tools"),
    "pair": ("instruction", "input", "output", "system"),
    "text": ("text",),
}
LEADING = {"messages": "messages", "pair": "instruction", "text": "text"}
DOMAIN_FIELD = "domain"
ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
EXTRA = ("name", "tool_call_id")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FUNCTION_CALL = "function_call"  # ShareGPT's role of an assistant that calls a tool; its text is the call in JSON
NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdd3]")
# Literal end marks that exports leave at the end of answers; the tokenizer's own end token is put there anyway.
END_MARKS = (
    *("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"),
    *("<eos>", "<end_of_turn>", "<|end|>", "<|eot|>"),
)


@dataclass(frozen=True)
class FieldMapping:
    """The row's key for each meaning; None where the rows have none. One of `text`, `messages`, `output` is set."""

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    system: str | None = None
    messages: str | None = None
    tools: str | None = None
    text: str | None = None
    domain: str | None = None

    def describe(self) -> str:
        """As reported: 'question -> answer', 'instruction + input -> output, domain from topic', 'messages'."""
        prompt = " + ".join(k for k in (self.system, self.instruction, self.input) if k)
        chat = " + ".join(k for k in (self.messages, self.tools) if k) if self.messages else None
        text = self.text or chat or f"{prompt} -> {self.output}"
        return f"{text}, domain from {self.domain}" if self.domain else text


Keys = Mapping[str, int]  # each key of a source, and the number of the first row that has it


def keys_of(rows: Iterable[Row]) -> dict[str, int]:
    """Every key that any of the rows has, with the first row that has it."""
    keys: dict[str, int] = {}
    for row in rows:
        if not row.values.keys() <= keys.keys():
            keys = {**dict.fromkeys(row.values, row.number), **keys}
    return keys


def find_mapping(keys: Keys, fields: FieldsSection, domain: DomainSection, place: str) -> FieldMapping:
    """The mapping for rows with these keys: as configured, else found by looking.

    Args:
        place: the source, for messages.

    Raises:
        DatasetError: nothing found for the prompt or the answer; two names that could both be meant, or rows of
            several forms. Names the rows, and what to set.
    """
    for meaning in ALIASES:
        configured = getattr(fields, meaning)
        if configured and configured not in keys:
            raise _no_such_field(f"data.fields.{meaning}", configured, keys, place)
    form = _one_form(keys, fields, place)
    found = {m: getattr(fields, m) or _find(m, keys, place) for m in MEANINGS[form]}
    missing = next((m for m in ("instruction", "output") if m in found and not found[m]), None)
    if missing:
        raise DatasetError(
            f"{place}: no {'prompt' if missing == 'instruction' else 'answer'} found among its fields "
            f"({', '.join(sorted(map(str, keys))) or 'none'}); looked for {', '.join(ALIASES[missing])}. "
            f"Name it: data.fields.{missing}=FIELD."
        )
    return FieldMapping(**found, domain=_domain_key(domain, keys, place))


def domain_of_file(file: str | Path) -> str:
    """The domain of a file's rows under data.domain.per_file: its name without endings."""
    return Path(file).name.split(".")[0]


def _domain_key(domain: DomainSection, keys: Keys, place: str) -> str | None:
    if domain.per_file:
        return None
    if domain.field == "auto":
        return DOMAIN_FIELD if DOMAIN_FIELD in keys else None
    if domain.field and domain.field not in keys:
        raise _no_such_field("data.domain.field", domain.field, keys, place)
    return domain.field


def _one_form(keys: Keys, fields: FieldsSection, place: str) -> str:
    """Which of text, messages, and prompt with answer (pair) the rows are: as asked, else the only one there."""
    asked = [form for form in ("text", "messages") if getattr(fields, form)]
    asked += ["pair"] if fields.instruction or fields.output else []
    if len(asked) == 1:
        return asked[0]
    there = {form: _candidates(form, keys) for form in MEANINGS}
    there = {form: found for form, found in there.items() if all(found)}
    if len(there) < 2:
        return next(iter(there), "pair")
    seen = [f"{' -> '.join(f[0] for f in found)} (row {keys[found[0][0]]})" for found in there.values()]
    ways = [f"data.fields.{LEADING[form]}={found[0][0]}" for form, found in there.items()]
    raise DatasetError(
        f"{place}: could be read as {' or as '.join(seen)}. Say which: {' or '.join(ways)}; rows of several forms "
        "belong into several files."
    )


def _candidates(form: str, keys: Keys) -> list[list[str]]:
    """The keys that could hold each meaning that a form cannot do without."""
    needed = ("instruction", "output") if form == "pair" else (form,)
    return [[alias for alias in ALIASES[meaning] if alias in keys] for meaning in needed]


def _find(meaning: str, keys: Keys, place: str) -> str | None:
    there = [alias for alias in ALIASES[meaning] if alias in keys]
    if len(there) > 1:
        seen = " and ".join(f"'{alias}' (row {keys[alias]})" for alias in there)
        raise DatasetError(
            f"{place}: {seen} could each be the {meaning}. Say which: data.fields.{meaning}={there[0]}; "
            "rows of several forms belong into several files."
        )
    return there[0] if there else None


def _no_such_field(key: str, name: str, keys: Collection[str], place: str) -> DatasetError:
    close = nearest(name, keys)
    hint = f" Did you mean '{close}'?" if close else f" Its fields: {', '.join(sorted(map(str, keys)))}."
    return DatasetError(f"{key}: {place} has no field '{name}'.{hint}")


def to_example(row: Row, mapping: FieldMapping, per_file_domain: bool = False) -> Example:
    """The row as an example.

    Raises:
        DatasetError: a needed field is missing, null, empty or no text; names the row and the field.
    """
    domain = domain_of_file(row.file) if per_file_domain else None
    if mapping.domain:
        domain = _text(row, mapping.domain).strip()
    if mapping.text:
        text = (Message("assistant", _text(row, mapping.text)),)
        return Example(text, domain, row.file, row.number, is_text=True)
    messages = chat_of(row, mapping.messages) if mapping.messages else _pair(row, mapping)
    if messages[-1].role != "assistant":
        raise DatasetError(
            f"{row.place}: '{mapping.messages}' ends with a {messages[-1].role} message; nothing follows that could "
            "be learned. End it with an assistant message."
        )
    return Example(messages, domain, row.file, row.number, _tools(row, mapping.tools))


def strip_end_marks(example: Example) -> tuple[Example, list[str]]:
    """The example without literal end marks at the end of its answers, and the marks that were there."""
    marks: list[str] = []
    messages = tuple(_without_mark(m, marks) if m.role == "assistant" else m for m in example.messages)
    return (replace(example, messages=messages) if marks else example), marks


def _without_mark(message: Message, marks: list[str]) -> Message:
    text = message.text.rstrip()
    mark = next((m for m in END_MARKS if text.endswith(m)), None)
    if mark is None:
        return message
    marks.append(mark)
    return replace(message, text=text.removesuffix(mark))


def _pair(row: Row, mapping: FieldMapping) -> tuple[Message, ...]:
    assert mapping.output
    answer = Message("assistant", _text(row, mapping.output))
    return (*prompt_of(row, mapping), answer)


def prompt_of(row: Row, mapping: FieldMapping) -> tuple[Message, ...]:
    """System message, if any, and prompt of a row with fields."""
    assert mapping.instruction
    user = Message("user", _text(row, mapping.instruction), _optional(row, mapping.input))
    system = _optional(row, mapping.system)
    return (Message("system", system), user) if system else (user,)


def chat_of(row: Row, key: str) -> tuple[Message, ...]:
    """The messages of a row with a chat, however they are written.

    Raises:
        DatasetError: no list of messages, a role that is not known, content that is no text; names the message.
    """
    value = row.values.get(key)
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{row.place}: '{key}' is {_kind(value)}, expected a list of {{role, content}}.")
    messages = [_message(f"{row.place}, '{key}' message {turn}", item) for turn, item in enumerate(value, 1)]
    if messages[0].role in ("assistant", "tool"):
        raise DatasetError(
            f"{row.place}: '{key}' begins with a message of the {messages[0].role}; nothing asks for it. "
            "Begin with a user or system message."
        )
    return tuple(messages)


def _message(place: str, item: Any) -> Message:
    if not isinstance(item, dict) or not ({"role", "content"} <= set(item) or {"from", "value"} <= set(item)):
        found = f"one with {', '.join(map(str, item))}" if isinstance(item, dict) else _kind(item)
        raise DatasetError(
            f"{place}: expected an object with 'role' and 'content' (or 'from', 'value'), found {found}."
        )
    name = str(item.get("role", item.get("from")))
    role = ROLE_NAMES.get(name)
    if role is None:
        close = nearest(name, ROLE_NAMES)
        hint = f" Did you mean '{close}'?" if close else ""
        raise DatasetError(f"{place}: role '{name}' is none of {', '.join(get_args(Role))}.{hint}")
    _refuse_thoughts_apart(place, item)
    content = item.get("content", item.get("value"))
    calls = _calls(place, name, content, item)
    said = "" if name == FUNCTION_CALL or (calls and content in (None, "")) else _content(place, content)
    extra = {key: item[key] for key in EXTRA if item.get(key)}
    return Message(role, said, learn=_learned(place, role, item), calls=calls, extra=extra)


def _refuse_thoughts_apart(place: str, item: dict[str, Any]) -> None:
    apart = next((key for key in THOUGHTS if item.get(key)), None)
    if apart:
        raise DatasetError(
            f"{place}: '{apart}' stands apart from the content and would not be learned. Put it into the content as "
            "<think>...</think> and set data.thinking=true, or take it out."
        )


def _content(place: str, content: Any) -> str:
    """Text, or the text parts of a content list ({"type": "text", "text": ...})."""
    if isinstance(content, list) and content:
        parts = [p.get("text", p.get("value")) if isinstance(p, dict) else p for p in content]
        kinds = [p.get("type", "text") if isinstance(p, dict) else "text" for p in content]
        other = next((k for k in kinds if k != "text"), None)
        if other:
            raise DatasetError(f"{place}: has a part of type '{other}'; only text can be trained on.")
        content = "".join(str(p) for p in parts) if all(isinstance(p, str) for p in parts) else None
    if not isinstance(content, str) or not content:
        raise DatasetError(f"{place}: 'content' is {_kind(content)}, expected text.")
    return _encodable(f"{place}: 'content'", content)


def _learned(place: str, role: Role, item: dict[str, Any]) -> bool:
    """What `loss_weight` (or `weight`) says: 0 or 1; without one every assistant message is learned."""
    weight = item.get("loss_weight", item.get("weight"))
    if weight is None:
        return True
    if weight not in (0, 1):
        raise DatasetError(f"{place}: 'loss_weight' is {weight!r}, expected 0 or 1.")
    if weight and role != "assistant":
        raise DatasetError(f"{place}: 'loss_weight' is 1 on a {role} message; only an assistant's can be learned.")
    return bool(weight)


def _calls(place: str, name: str, content: Any, item: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The functions that a message calls: ShareGPT's function_call text, or OpenAI's `tool_calls`."""
    if name == FUNCTION_CALL:
        call = _json_of(place, content, "a function call in JSON")
        return tuple(_call(place, c) for c in (call if isinstance(call, list) else [call]))
    listed = item.get("tool_calls") or []
    if not isinstance(listed, list):
        raise DatasetError(f"{place}: 'tool_calls' is {_kind(listed)}, expected a list of calls.")
    return tuple(_call(place, c.get("function", c) if isinstance(c, dict) else c) for c in listed)


def _call(place: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise DatasetError(
            f"{place}: a function call is {_kind(call)}, expected an object with 'name' and 'arguments'."
        )
    arguments = call.get("arguments", {})
    return {
        "name": call["name"],
        "arguments": _json_of(place, arguments, "arguments in JSON") if isinstance(arguments, str) else arguments,
    }


def _tools(row: Row, key: str | None) -> tuple[dict[str, Any], ...]:
    """The tools of a chat, each as OpenAI writes them: {"type": "function", "function": {...}}."""
    value = row.values.get(key) if key else None
    if not value:
        return ()
    tools = _json_of(f"{row.place}, '{key}'", value, "a list of tools in JSON") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DatasetError(f"{row.place}: '{key}' is {_kind(tools)}, expected a list of tool descriptions.")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _json_of(place: str, text: Any, expected: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{place}: expected {expected}, found {str(text)[:60]!r} ({error}).") from error


def _text(row: Row, key: str) -> str:
    if key not in row.values:
        there = ", ".join(sorted(map(str, row.values))) or "none"
        raise DatasetError(f"{row.place}: has no field '{key}' (its fields: {there}). Add it, or remove the row.")
    value = row.values[key]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number or (isinstance(value, str) and value.strip())):
        raise DatasetError(f"{row.place}: '{key}' is {_kind(value)}, expected text. Mend it, or remove the row.")
    return _encodable(f"{row.place}: '{key}'", str(value))


def _encodable(place: str, text: str) -> str:
    """`text`, if UTF-8 can write it and none of it is a noncharacter that stands for other text in templates."""
    found = NO_TEXT.search(text)
    if found:
        what = "half a surrogate pair" if "\ud800" <= found[0] <= "\udfff" else "a noncharacter of Unicode"
        raise DatasetError(f"{place} holds {what} (U+{ord(found[0]):04X}) at {found.start()}. Take it out.")
    return text


def _optional(row: Row, key: str | None) -> str:
    value = row.values.get(key) if key else None
    return "" if key is None or value is None or value == "" else _text(row, key)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    if isinstance(value, str) and not value.strip():
        return "only white space" if value else "empty"
    return "empty" if value in ([], {}) else f"a {type(value).__name__}"
