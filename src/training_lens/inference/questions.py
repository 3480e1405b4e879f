"""Rows to questions: a file in any format that training takes, its answers optional, as prompts for a session."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training_lens.config.schema import DomainSection, FieldsSection
from training_lens.data.fields import ALIASES, FieldMapping, domain_of_file, find_mapping, keys_of, to_example
from training_lens.data.sources import Source
from training_lens.data.types import Example, Row
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.inference.session import Session
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
NO_ANSWER = "(no answer)"  # the field of answers in a file that has none
STAND_IN = "-"  # takes the place of a missing answer, so that the prompt before it is read as in training


@dataclass(frozen=True)
class Question:
    """A row that can be asked."""

    row: int
    prompt: str
    domain: str | None
    expected: str | None
    ids: list[int]

    def line(self, answer: str) -> bytes:
        """The row's line of the output."""
        value = {"row": self.row, "prompt": self.prompt, "domain": self.domain, "answer": answer}
        return (json.dumps(value | {"expected": self.expected}, ensure_ascii=False) + "\n").encode()

    def is_answered_by(self, line: bytes) -> bool:
        try:
            value = json.loads(line)
        except ValueError:
            return False
        asked = {"row": self.row, "prompt": self.prompt, "domain": self.domain}
        return isinstance(value, dict) and asked == {key: value.get(key) for key in asked}


@dataclass(frozen=True)
class PassedOver:
    """A row that cannot be asked."""

    row: int
    reason: str


class QuestionReader:
    """Reads rows as the session's training did, where its fields are there, and else by looking."""

    def __init__(self, session: Session, rows: Sequence[Row | PassedOver], source: Source, domain: str | None) -> None:
        whole = [row for row in rows if isinstance(row, Row)]
        if not whole:
            raise DatasetError(f"{source.name}: holds no rows that can be read.")
        domains = _domains(set(keys_of(whole)), session, source.files[0], domain)
        self._session, self._domain, self._per_file = session, domain, domains.per_file
        self._mapping = _mapping(whole, session, domains)
        logger.info("%s: %d rows, read as %s", source.name, len(rows), self._mapping.describe())

    def __call__(self, rows: Sequence[Row | PassedOver]) -> tuple[list[Question], list[PassedOver]]:
        asked = [self._question(row) if isinstance(row, Row) else row for row in rows]
        return [q for q in asked if isinstance(q, Question)], [p for p in asked if isinstance(p, PassedOver)]

    def _question(self, row: Row) -> Question | PassedOver:
        try:
            example, expected = _example(row, self._mapping, self._per_file)
            *prompt, _ = example.messages
            if not prompt or prompt[-1].role not in ("user", "tool"):
                raise DatasetError("nothing that asks stands before the answer.")
            "".join(m.text + m.input for m in example.messages).encode()  # JSON may hold half a surrogate pair
            domain = self._domain or example.domain
            ids = self._session.prompt_ids(prompt, domain, example.tools)
        except UnicodeEncodeError as error:
            return PassedOver(row.number, f"is no text in UTF-8 ({error.reason}).")
        except (DatasetError, ConfigurationError) as error:
            return PassedOver(row.number, str(error).removeprefix(f"{row.place}: "))
        last = prompt[-1]
        return Question(row.number, f"{last.text}\n{last.input}" if last.input else last.text, domain, expected, ids)


def read_lines(source: Source) -> list[Row | PassedOver]:
    """The source's rows; a line of JSONL that is broken is passed over, and not the end of the file."""
    items: list[Row | PassedOver] = []
    for row in source.rows(lambda number, reason: items.append(PassedOver(number, reason))):
        items.append(row)
    return items


def _domains(keys: set[str], session: Session, source: Path, domain: str | None) -> DomainSection:
    """Where the rows' domains come from: a run's own settings were for its own files, these may lack their field."""
    own = session.config.data.domain
    if session.domains is None and domain is None:
        return own
    known = session.domains if domain is None and session.domains else ()
    if own.per_file:
        return DomainSection(field=None, per_file=domain_of_file(source) in known)
    return DomainSection(field=own.field if known and own.field in ("auto", *keys) else None)


def _mapping(rows: Sequence[Row], session: Session, domains: DomainSection) -> FieldMapping:
    keys, fields = keys_of(rows), session.config.data.fields
    if session.domains is not None:
        fields = FieldsSection(**{meaning: key for meaning, key in fields if key in keys})
    answers = keys.keys() & {*ALIASES["output"], *ALIASES["messages"]}
    if not (answers or fields.output or fields.messages):
        keys[NO_ANSWER] = rows[0].number
        fields = fields.model_copy(update={"output": NO_ANSWER})
    return find_mapping(keys, fields, domains, rows[0].file)


def _example(row: Row, mapping: FieldMapping, per_file: bool) -> tuple[Example, str | None]:
    """The row as in training, and its answer; None where it has none, and a stand-in ends the example."""
    try:
        example = to_example(row, mapping, per_file)
    except DatasetError:
        return to_example(replace(row, values=_with_stand_in(row.values, mapping)), mapping, per_file), None
    return example, example.messages[-1].text


def _with_stand_in(values: Mapping[str, Any], mapping: FieldMapping) -> dict[str, Any]:
    if mapping.output:
        return {**values, mapping.output: STAND_IN}
    chat = values.get(str(mapping.messages))
    more = [*chat, {"role": "assistant", "content": STAND_IN}] if isinstance(chat, list) else chat
    return {**values, str(mapping.messages): more}
