"""Rows to prompts: a file in any format that training takes, with or without answers, as prompts for a session."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training_lens.config.data_sections import DataSection, DomainSection, FieldsSection
from training_lens.data.examples import Example, Message, Row
from training_lens.data.fields import (
    FieldMapping,
    collect_keys,
    domain_from_file,
    find_mapping,
    has_field,
    text_field,
)
from training_lens.data.notes import DataNotes, strip_location
from training_lens.data.row_keys import ALIASES, FALLBACKS, plain_name
from training_lens.data.row_reader import RowReader, strip_end_marks
from training_lens.data.sources import DataSource
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.inference.generator import GeneratedAnswer
from training_lens.inference.session import Session
from training_lens.utils.limits import load_bounded_json
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
NO_ANSWER = "(no answer)"  # the field of answers in a file that has none
LINE_FIELDS = ("row", "prompt", "domain", "key", "answer", "expected", "finish_reason")  # of an output line
KEY_DIGITS = 16  # of the key in an output line
ANSWERS = {*ALIASES["output"], *FALLBACKS["output"], *ALIASES["messages"]}
PLACEHOLDER = "-"  # takes the place of a missing answer, so that the prompt before it is read as in training
# Keys by which people find a row again: lower case, letters and digits.
ID_NAMES = {"id", "uid", "uuid", "guid", "qid", "idx", "index", "hash", "sha256", "md5"}
ID_ENDING = re.compile(r"(?:[_\-. ](?:id|uid|uuid|idx|ID|Id|UID|UUID)|[a-z0-9](?:Id|ID|Uid|UUID))$")


@dataclass(frozen=True)
class PromptRow:
    """A row that can be answered: `ids` are the prompt's tokens, `row_ids` the row's own ids by their keys."""

    row: int
    prompt: str
    domain: str | None
    expected: str | None
    ids: list[int]
    key: str  # a digest of the prompt's tokens, the model and the settings
    row_ids: Mapping[str, Any] = field(default_factory=dict)

    def output_line(self, answer: GeneratedAnswer) -> bytes:
        """The row's line of the output."""
        values = {"answer": answer.text, "expected": self.expected, "finish_reason": answer.finish_reason}
        rest = json.dumps({**values, **self.row_ids}, ensure_ascii=False)
        return self._line_start() + f"{rest[1:]}\n".encode()

    def explain_mismatch(self, line: bytes, place: str) -> str | None:
        """Why a complete line of the output does not answer this row, called `place`; None if it does."""
        value = read_answer_line(line)
        asked = {"row": self.row, "prompt": self.prompt, "domain": self.domain}
        # An earlier version wrote no ids.
        asked |= {key: row_id for key, row_id in self.row_ids.items() if value and key in value}
        if value is None or asked != {key: value.get(key) for key in asked}:
            return f"does not answer {place}, so it belongs to another input"
        if value.get("key") != self.key:
            return (
                f"answers {place}, but with other inputs than now: the model, the adapter, the settings, the template "
                "or the messages before the prompt have changed"
            )
        return None

    def can_start_with(self, cut: bytes) -> bool:
        """Whether an incomplete line may be the start of this row's."""
        start = self._line_start()
        return start.startswith(cut) or cut.startswith(start)

    def _line_start(self) -> bytes:
        """The row's line up to the answer."""
        asked = {"row": self.row, "prompt": self.prompt, "domain": self.domain, "key": self.key}
        return f"{json.dumps(asked, ensure_ascii=False)[:-1]}, ".encode()


def read_answer_line(line: bytes) -> dict[str, Any] | None:
    """The values of a line of the output; None if it is not a JSON object."""
    try:
        value = load_bounded_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class SkippedRow:
    """A row that cannot be answered."""

    row: int
    reason: str


class PromptReader:
    """Reads rows by the fields of the session's training where they are there, and by detecting them otherwise.

    Without a `domain` each row has its own. `answerer` describes the model and the settings; with the prompt's tokens
    it makes the key of a row.
    """

    def __init__(
        self, session: Session, rows: Sequence[Row | SkippedRow], source: DataSource, domain: str | None, answerer: str
    ) -> None:
        whole = [row for row in rows if isinstance(row, Row)]
        if not whole:
            raise DatasetError(f"{source.name}: holds no rows that can be read.")
        domains = _choose_domains(set(collect_keys(whole)), session, source.files[0], domain)
        self._session, self._domain, self._answerer = session, domain, answerer
        data = session.config.data.model_copy(update={"domain": domains})
        self._mapping = _choose_mapping(whole, session, data)
        self._notes, self._source = DataNotes(), source.name
        self._reader = RowReader(self._mapping, data, source.name, self._notes)
        self._logged_keys: set[str] = set()
        self._id_keys = find_id_keys(collect_keys(whole), {*LINE_FIELDS, *self._mapping.key_by_meaning.values()})
        logger.info("%s: %d rows, read as %s", source.name, len(rows), self._mapping.describe())
        if self._id_keys:
            logger.info("%s: kept with each answer: %s", source.name, ", ".join(self._id_keys))

    def read_prompts(self, rows: Sequence[Row | SkippedRow]) -> tuple[list[PromptRow], list[SkippedRow]]:
        """The rows that can be answered, and those that cannot."""
        found = [self._read_prompt(row) if isinstance(row, Row) else row for row in rows]
        ignored = self._notes.ignored_keys.get(self._source, ())
        new = [key for key in ignored if key not in {*self._logged_keys, *self._id_keys}]
        self._logged_keys.update(new)
        if new:
            logger.info("%s: not used: %s", self._source, ", ".join(new))
        return [p for p in found if isinstance(p, PromptRow)], [s for s in found if isinstance(s, SkippedRow)]

    def _read_prompt(self, row: Row) -> PromptRow | SkippedRow:
        try:
            example, expected = self._read_example(row)
            *prompt, _ = example.messages
            if not prompt or prompt[-1].role not in ("user", "tool"):
                raise DatasetError("nothing that asks stands before the answer.")
            domain = self._domain or example.domain
            ids = self._session.prompt_ids(prompt, domain, example.tools)
        except (DatasetError, ConfigurationError) as error:
            return SkippedRow(row.number, str(error).removeprefix(f"{row.place}: "))
        last = prompt[-1]
        shown = f"{last.text}\n{last.input}" if last.input else last.text
        key = hashlib.sha256(json.dumps([self._answerer, ids]).encode()).hexdigest()[:KEY_DIGITS]
        own = {k: row.values[k] for k in self._id_keys if isinstance(row.values.get(k, ()), str | int | float | None)}
        return PromptRow(row.number, shown, domain, expected, ids, key, own)

    def _read_example(self, row: Row) -> tuple[Example, str | None]:
        """The row as in training, and its answer; None where it has none, and a placeholder ends the example."""
        if self._mapping.masks:  # which tokens of an answer are trained on does not matter here
            row = replace(row, values={k: v for k, v in row.values.items() if k not in self._mapping.masks})
        try:
            example, has_answer = self._reader.read_row(row), True
        except DatasetError as error:
            if self._mapping.text:
                raise
            row = replace(row, values={**row.values, **_placeholder(row.values, self._mapping)})
            example, has_answer = self._reader.read_row(row), False
            if example.messages[-2].role == "assistant":  # it had an answer, and another fault
                raise error from None
        if self._session.config.data.strip_end_marks:
            example, _ = strip_end_marks(example)
        last = example.messages[-1].text
        if example.is_text:
            return replace(example, messages=(Message("user", last), Message("assistant", PLACEHOLDER))), None
        return example, last if has_answer else None


def read_lines(source: DataSource, data: DataSection) -> list[Row | SkippedRow]:
    """The source's rows; one that cannot be read is skipped."""
    items: list[Row | SkippedRow] = []

    def skip_row(number: int, error: DatasetError) -> None:
        items.append(SkippedRow(number, strip_location(str(error), source.name, number)))

    for row in source.read_rows(data, skip_row, lambda sentence: logger.info("%s: %s", source.name, sentence)):
        items.append(row)
    return items


def _choose_domains(keys: set[str], session: Session, source: Path, domain: str | None) -> DomainSection:
    """Where the rows' domains come from: a run's settings were for its own files, and these may lack the field."""
    own = session.config.data.domain
    if session.domains is None and domain is None:
        return own
    known = session.domains if domain is None and session.domains else ()
    if own.per_file:
        return DomainSection(field=None, per_file=domain_from_file(source) in known)
    return DomainSection(field=own.field if known and own.field in ("auto", *keys) else None)


def _choose_mapping(rows: Sequence[Row], session: Session, data: DataSection) -> FieldMapping:
    keys, fields = collect_keys(rows), data.fields
    if session.domains is not None:
        fields = FieldsSection(**{meaning: key for meaning, key in fields if key and has_field(keys, key)})
    if session.continues_text and text_field(fields) in keys:
        fields = FieldsSection(text=text_field(fields))
    elif not (fields.output or fields.messages or any(plain_name(key) in ANSWERS for key in keys)):
        keys[NO_ANSWER] = rows[0].number
        fields = fields.model_copy(update={"output": NO_ANSWER})
    return find_mapping(keys, data.model_copy(update={"fields": fields}), rows[0].file)


def _placeholder(values: Mapping[str, Any], mapping: FieldMapping) -> dict[str, Any]:
    """A placeholder under the key of the answer, or at the end of the chat."""
    if mapping.output:
        return {mapping.output: PLACEHOLDER}
    chat = values.get(str(mapping.messages))
    more = [{"role": "assistant", "content": PLACEHOLDER}]
    return {str(mapping.messages): [*chat, *more] if isinstance(chat, list) else chat}


def find_id_keys(keys: Iterable[str], used: Collection[str]) -> tuple[str, ...]:
    """The keys that hold ids, such as `id`, `question_id`, `customId` and `UUID`, in the rows' order.

    Those `used` mean something else, such as the domain's, and field names of an output line.
    """
    others = (key for key in keys if key not in used)
    return tuple(k for k in others if re.sub(r"[^a-z0-9]", "", k.lower()) in ID_NAMES or ID_ENDING.search(k))
