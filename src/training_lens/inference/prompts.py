"""Rows to questions: a file in any format that training takes, its answers optional, as prompts for a session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training_lens.config.data_sections import CsvSection, DataSection, DomainSection, FieldsSection
from training_lens.data.examples import Example, Message, Row
from training_lens.data.fields import FieldMapping, collect_keys, domain_from_file, find_mapping, has_field
from training_lens.data.notes import DataNotes, strip_location
from training_lens.data.row_keys import ALIASES, FALLBACKS, plain_name
from training_lens.data.row_reader import RowReader, strip_end_marks
from training_lens.data.sources import DataSource
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.inference.generator import GeneratedAnswer
from training_lens.inference.row_ids import find_id_keys, read_ids
from training_lens.inference.session import Session, text_field
from training_lens.utils.limits import load_bounded_json
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
NO_ANSWER = "(no answer)"  # the field of answers in a file that has none
LINE_FIELDS = ("row", "prompt", "domain", "key", "answer", "expected", "finish_reason")  # of an output line
KEY_DIGITS = 16  # of the key in an output line
ANSWERS = {*ALIASES["output"], *FALLBACKS["output"], *ALIASES["messages"]}
STAND_IN = "-"  # takes the place of a missing answer, so that the prompt before it is read as in training


@dataclass(frozen=True)
class Question:
    """A row that can be asked; `row_ids` are its own ids by their keys."""

    row: int
    prompt: str
    domain: str | None
    expected: str | None
    ids: list[int]
    key: str  # a digest of the prompt's tokens and of what answers them
    row_ids: Mapping[str, Any] = field(default_factory=dict)

    def line(self, answer: GeneratedAnswer) -> bytes:
        """The row's line of the output."""
        values = {"answer": answer.text, "expected": self.expected, "finish_reason": answer.finish_reason}
        rest = json.dumps({**values, **self.row_ids}, ensure_ascii=False)
        return self._begin() + f"{rest[1:]}\n".encode()

    def difference(self, line: bytes, place: str) -> str | None:
        """What is wrong with a whole line of the output that must answer this row (`place`); None where it does."""
        value = read_answer_line(line)
        asked = {"row": self.row, "prompt": self.prompt, "domain": self.domain}
        # An earlier version wrote no ids.
        asked |= {key: row_id for key, row_id in self.row_ids.items() if value and key in value}
        if value is None or asked != {key: value.get(key) for key in asked}:
            return f"does not answer {place}, so it belongs to another input"
        if value.get("key") != self.key:
            return (
                f"answers {place}, but not as it is asked now: the model, the adapter, the settings, the template or "
                "the messages before the prompt have changed"
            )
        return None

    def begins_as(self, cut: bytes) -> bool:
        """Whether a line that was cut short may be the beginning of this row's."""
        begin = self._begin()
        return begin.startswith(cut) or cut.startswith(begin)

    def _begin(self) -> bytes:
        """The row's line up to the answer."""
        asked = {"row": self.row, "prompt": self.prompt, "domain": self.domain, "key": self.key}
        return f"{json.dumps(asked, ensure_ascii=False)[:-1]}, ".encode()


def read_answer_line(line: bytes) -> dict[str, Any] | None:
    """The values of a line of the output; None where it is no JSON object."""
    try:
        value = load_bounded_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class PassedOver:
    """A row that cannot be asked."""

    row: int
    reason: str


class QuestionReader:
    """Reads rows as the session's training did, where its fields are there, and else by looking.

    Args:
        domain: of every row; None takes each row's own.
        answerer: says what answers, and how; with the prompt's tokens, it makes the key of a question.
    """

    def __init__(
        self,
        session: Session,
        rows: Sequence[Row | PassedOver],
        source: DataSource,
        domain: str | None,
        answerer: str,
    ) -> None:
        whole = [row for row in rows if isinstance(row, Row)]
        if not whole:
            raise DatasetError(f"{source.name}: holds no rows that can be read.")
        domains = _domains(set(collect_keys(whole)), session, source.files[0], domain)
        self._session, self._domain, self._answerer = session, domain, answerer
        data = session.config.data.model_copy(update={"domain": domains})
        self._mapping = _mapping(whole, session, data)
        self._notes, self._source = DataNotes(), source.name
        self._reader = RowReader(self._mapping, data, source.name, self._notes)
        self._told: set[str] = set()
        self._id_keys = find_id_keys(collect_keys(whole), {*LINE_FIELDS, *self._mapping.key_by_meaning.values()})
        logger.info("%s: %d rows, read as %s", source.name, len(rows), self._mapping.describe())
        if self._id_keys:
            logger.info("%s: kept with each answer: %s", source.name, ", ".join(self._id_keys))

    def __call__(self, rows: Sequence[Row | PassedOver]) -> tuple[list[Question], list[PassedOver]]:
        asked = [self._question(row) if isinstance(row, Row) else row for row in rows]
        self._log_unused_keys()
        return [q for q in asked if isinstance(q, Question)], [p for p in asked if isinstance(p, PassedOver)]

    def _log_unused_keys(self) -> None:
        """Tell of keys that are not used, each once."""
        new = [
            key for key in self._notes.ignored_keys.get(self._source, ()) if key not in {*self._told, *self._id_keys}
        ]
        self._told.update(new)
        if new:
            logger.info("%s: not used: %s", self._source, ", ".join(new))

    def _question(self, row: Row) -> Question | PassedOver:
        try:
            example, expected = self._example(row)
            *prompt, _ = example.messages
            if not prompt or prompt[-1].role not in ("user", "tool"):
                raise DatasetError("nothing that asks stands before the answer.")
            domain = self._domain or example.domain
            ids = self._session.prompt_ids(prompt, domain, example.tools)
        except (DatasetError, ConfigurationError) as error:
            return PassedOver(row.number, str(error).removeprefix(f"{row.place}: "))
        last = prompt[-1]
        shown = f"{last.text}\n{last.input}" if last.input else last.text
        key = hashlib.sha256(json.dumps([self._answerer, ids]).encode()).hexdigest()[:KEY_DIGITS]
        return Question(row.number, shown, domain, expected, ids, key, read_ids(row.values, self._id_keys))

    def _example(self, row: Row) -> tuple[Example, str | None]:
        """The row as in training, and its answer; None where it has none, and a stand-in ends the example."""
        if self._mapping.masks:  # how an answer is learned does not matter to who asks for one
            row = replace(row, values={k: v for k, v in row.values.items() if k not in self._mapping.masks})
        try:
            example, answered = self._reader.read_row(row), True
        except DatasetError as error:
            if self._mapping.text:
                raise
            row = replace(row, values=_with_stand_in(row.values, self._mapping))
            example, answered = self._reader.read_row(row), False
            if example.messages[-2].role == "assistant":  # it had an answer, and another fault
                raise error from None
        if self._session.config.data.strip_end_marks:
            example, _ = strip_end_marks(example)
        said = example.messages[-1].text
        if example.is_text:
            return replace(example, messages=(Message("user", said), Message("assistant", STAND_IN))), None
        return example, said if answered else None


def read_lines(source: DataSource, csv: CsvSection) -> list[Row | PassedOver]:
    """The source's rows; one that cannot be read is passed over, and not the end of the file."""
    items: list[Row | PassedOver] = []

    def pass_over(number: int, error: DatasetError) -> None:
        items.append(PassedOver(number, strip_location(str(error), source.name, number)))

    for row in source.read_rows(csv, pass_over, lambda sentence: logger.info("%s: %s", source.name, sentence)):
        items.append(row)
    return items


def _domains(keys: set[str], session: Session, source: Path, domain: str | None) -> DomainSection:
    """Where the rows' domains come from: a run's own settings were for its own files, these may lack their field."""
    own = session.config.data.domain
    if session.domains is None and domain is None:
        return own
    known = session.domains if domain is None and session.domains else ()
    if own.per_file:
        return DomainSection(field=None, per_file=domain_from_file(source) in known)
    return DomainSection(field=own.field if known and own.field in ("auto", *keys) else None)


def _mapping(rows: Sequence[Row], session: Session, data: DataSection) -> FieldMapping:
    keys, fields = collect_keys(rows), data.fields
    if session.domains is not None:
        fields = FieldsSection(**{meaning: key for meaning, key in fields if key and has_field(keys, key)})
    if session.continues_text and text_field(fields) in keys:
        fields = FieldsSection(text=text_field(fields))
    elif not (fields.output or fields.messages or any(plain_name(key) in ANSWERS for key in keys)):
        keys[NO_ANSWER] = rows[0].number
        fields = fields.model_copy(update={"output": NO_ANSWER})
    return find_mapping(keys, data.model_copy(update={"fields": fields}), rows[0].file)


def _with_stand_in(values: Mapping[str, Any], mapping: FieldMapping) -> dict[str, Any]:
    """The row with a stand-in where it has no answer."""
    if mapping.output:
        return {**values, mapping.output: STAND_IN}
    chat = values.get(str(mapping.messages))
    more = [*chat, {"role": "assistant", "content": STAND_IN}] if isinstance(chat, list) else chat
    return {**values, str(mapping.messages): more}
