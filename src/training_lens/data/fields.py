"""Rows to examples: which fields hold the prompt and the answer, found by looking or as configured."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from training_lens.config.data_sections import DomainSection, FieldsSection
from training_lens.data.messages import chat_of, tools_of
from training_lens.data.types import Example, Message, Row
from training_lens.data.values import optional_text, text_of
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
            raise no_such_field(f"data.fields.{meaning}", configured, keys, place)
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
        raise no_such_field("data.domain.field", domain.field, keys, place)
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


def no_such_field(key: str, name: str, keys: Collection[str], place: str) -> DatasetError:
    """The error that the setting `key` names a field that no row of a source has; says the nearest that there is."""
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
        domain = text_of(row, mapping.domain).strip()
    if mapping.text:
        text = (Message("assistant", text_of(row, mapping.text)),)
        return Example(text, domain, row.file, row.number, is_text=True)
    messages = chat_of(row, mapping.messages) if mapping.messages else _pair(row, mapping)
    if messages[-1].role != "assistant":
        raise DatasetError(
            f"{row.place}: '{mapping.messages}' ends with a {messages[-1].role} message; nothing follows that could "
            "be learned. End it with an assistant message."
        )
    return Example(messages, domain, row.file, row.number, tools_of(row, mapping.tools))


def strip_end_marks(example: Example) -> tuple[Example, list[str]]:
    """The example without literal end marks at the end of its answers, and the marks that were there."""
    marks: list[str] = []
    messages = tuple(_without_mark(m, marks) if m.role == "assistant" else m for m in example.messages)
    return (replace(example, messages=messages) if marks else example), marks


def _without_mark(message: Message, marks: list[str]) -> Message:
    text = message.text.rstrip()
    if not text.endswith(END_MARKS):
        return message
    mark = next(m for m in END_MARKS if text.endswith(m))
    marks.append(mark)
    return replace(message, text=text.removesuffix(mark))


def _pair(row: Row, mapping: FieldMapping) -> tuple[Message, ...]:
    assert mapping.output
    answer = Message("assistant", text_of(row, mapping.output))
    return (*prompt_of(row, mapping), answer)


def prompt_of(row: Row, mapping: FieldMapping) -> tuple[Message, ...]:
    """System message, if any, and prompt of a row with fields."""
    assert mapping.instruction
    user = Message("user", text_of(row, mapping.instruction), optional_text(row, mapping.input))
    system = optional_text(row, mapping.system)
    return (Message("system", system), user) if system else (user,)
