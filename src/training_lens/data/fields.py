"""Rows to examples: which fields hold the prompt and the answer, found by looking or as configured."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
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
    "messages": ("messages",),
}
DOMAIN_FIELD = "domain"
ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class FieldMapping:
    """The row's key for each meaning; None where the rows have none."""

    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    system: str | None = None
    messages: str | None = None
    domain: str | None = None

    def describe(self) -> str:
        """As reported: 'question -> answer', 'instruction + input -> output, domain from topic', 'messages'."""
        prompt = " + ".join(k for k in (self.system, self.instruction, self.input) if k)
        text = self.messages or f"{prompt} -> {self.output}"
        return f"{text}, domain from {self.domain}" if self.domain else text


def find_mapping(keys: Collection[str], fields: FieldsSection, domain: DomainSection, place: str) -> FieldMapping:
    """The mapping for rows with these keys: as configured, else found by looking.

    Args:
        keys: the keys of the file's first rows together.
        place: the file, for messages.

    Raises:
        DatasetError: nothing found for the prompt or the answer, or two names that could both be meant.
    """
    found = {meaning: getattr(fields, meaning) or _find(meaning, keys, place) for meaning in ALIASES}
    for meaning in ALIASES:
        configured = getattr(fields, meaning)
        if configured and configured not in keys:
            raise _no_such_field(f"data.fields.{meaning}", configured, keys, place)
    domain_key = None if domain.per_file else domain.field
    if domain_key == "auto":
        domain_key = DOMAIN_FIELD if DOMAIN_FIELD in keys else None
    elif domain_key and domain_key not in keys:
        raise _no_such_field("data.domain.field", domain_key, keys, place)
    pair = found["instruction"] and found["output"]
    if found["messages"] and pair and not (fields.messages or fields.instruction):
        raise DatasetError(
            f"{place}: could be read as {found['messages']} or as {found['instruction']} -> {found['output']}. "
            f"Say which: data.fields.messages={found['messages']} or data.fields.instruction={found['instruction']}."
        )
    if found["messages"] and not fields.instruction:
        return FieldMapping(messages=found["messages"], domain=domain_key)
    if not pair:
        missing = "prompt" if not found["instruction"] else "answer"
        meaning = "instruction" if missing == "prompt" else "output"
        raise DatasetError(
            f"{place}: no {missing} found among its fields ({', '.join(sorted(keys)) or 'none'}); looked for "
            f"{', '.join(ALIASES[meaning])}. Name it: data.fields.{meaning}=FIELD."
        )
    return FieldMapping(found["instruction"], found["input"], found["output"], found["system"], None, domain_key)


def _find(meaning: str, keys: Collection[str], place: str) -> str | None:
    there = [alias for alias in ALIASES[meaning] if alias in keys]
    if len(there) > 1:
        raise DatasetError(
            f"{place}: {' and '.join(there)} could each be the {meaning}. Say which: data.fields.{meaning}={there[0]}."
        )
    return there[0] if there else None


def _no_such_field(key: str, name: str, keys: Collection[str], place: str) -> DatasetError:
    close = nearest(name, keys)
    hint = f" Did you mean '{close}'?" if close else f" Its fields: {', '.join(sorted(keys))}."
    return DatasetError(f"{key}: {place} has no field '{name}'.{hint}")


def keys_of(rows: Iterable[Row]) -> set[str]:
    """Every key that any of the rows has."""
    return {key for row in rows for key in row.values}


def to_example(row: Row, mapping: FieldMapping, per_file_domain: bool = False) -> Example:
    """The row as an example.

    Raises:
        DatasetError: a needed field is missing, null, empty or no text; names the row and the field.
    """
    domain = Path(row.file).stem if per_file_domain else None
    if mapping.domain:
        domain = _text(row, mapping.domain).strip()
    messages = _chat(row, mapping.messages) if mapping.messages else _pair(row, mapping)
    return Example(messages, domain, row.file, row.number)


def _pair(row: Row, mapping: FieldMapping) -> tuple[Message, ...]:
    assert mapping.instruction and mapping.output
    user = Message("user", _text(row, mapping.instruction), _optional(row, mapping.input))
    system = _optional(row, mapping.system)
    start = (Message("system", system),) if system else ()
    return (*start, user, Message("assistant", _text(row, mapping.output)))


def _chat(row: Row, key: str) -> tuple[Message, ...]:
    value = row.values.get(key)
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{row.place}: '{key}' is {_kind(value)}, expected a list of {{role, content}}.")
    messages = tuple(_message(row, key, turn, item) for turn, item in enumerate(value, 1))
    if messages[-1].role != "assistant":
        raise DatasetError(
            f"{row.place}: '{key}' ends with a {messages[-1].role} message; nothing follows that could be learned. "
            "End it with an assistant message."
        )
    return messages


def _message(row: Row, key: str, turn: int, item: Any) -> Message:
    place = f"{row.place}, '{key}' message {turn}"
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise DatasetError(f"{place}: expected an object with 'role' and 'content', found {_kind(item)}.")
    role = ROLE_NAMES.get(str(item["role"]))
    if role is None:
        raise DatasetError(f"{place}: role '{item['role']}' is none of {', '.join(get_args(Role))}.")
    if not isinstance(item["content"], str) or not item["content"]:
        raise DatasetError(f"{place}: 'content' is {_kind(item['content'])}, expected text.")
    return Message(role, item["content"])


def _text(row: Row, key: str) -> str:
    if key not in row.values:
        there = ", ".join(sorted(row.values)) or "none"
        raise DatasetError(f"{row.place}: has no field '{key}' (its fields: {there}). Add it, or remove the row.")
    value = row.values[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise DatasetError(f"{row.place}: '{key}' is {_kind(value)}, expected text. Mend it, or remove the row.")
    return str(value)


def _optional(row: Row, key: str | None) -> str:
    value = row.values.get(key) if key else None
    return "" if key is None or value is None or value == "" else _text(row, key)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "empty" if value in ("", [], {}) else f"a {type(value).__name__}"
