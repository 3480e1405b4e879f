"""Write rows so that they train exactly like the rows that were read: choose the form, write JSONL or Parquet."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from training_lens.config.data_sections import CsvSection, DataSection, DomainSection, FieldsSection
from training_lens.data.examples import Example, Message, Row
from training_lens.data.fields import DOMAIN_FIELD, find_mapping
from training_lens.data.notes import DataNotes
from training_lens.data.source_reader import read_usable_rows
from training_lens.errors import DatasetError
from training_lens.preparation.corpus import Corpus, SourceReading

# as_read: the row's own keys and values. Other forms are written from the example, under the first names in
# `row_keys.ALIASES`.
Form = Literal["as_read", "pair", "messages", "text"]
FileFormat = Literal["jsonl", "parquet"]
# Meanings that rows may lack.
OPTIONAL = ("input", "system", "history", "tools", "label", "rejected", "output")
CHUNK = 1000  # rows of a Parquet file in memory at a time


def choose_form(corpus: Corpus, file_format: FileFormat) -> Form:
    """The form in which one file can hold all rows without changing how they are read.

    Rows stay unchanged if one mapping reads them all. For Parquet, whose columns are typed, and for differing sources,
    rows are rewritten: only what is learned, without other keys.

    Raises:
        DatasetError: no single form fits all sources; names two of them.
    """
    if file_format == "jsonl" and _share_a_mapping(corpus):
        return "as_read"
    _refuse_some_without_domain(corpus)
    by_form = {_detect_form(reading, corpus.data): reading for reading in reversed(corpus.readings)}
    if len(by_form) == 1:
        return next(iter(by_form))
    if "text" in by_form:
        one, other = by_form.pop("text"), next(iter(by_form.values()))
        raise DatasetError(
            f"{one.source.name} holds plain texts, {other.source.name} is read as {other.mapping.describe()}: one file "
            "cannot hold both. Prepare them apart, each with its own prepare.output, and train on both."
        )
    return "messages"


def _share_a_mapping(corpus: Corpus) -> bool:
    """Whether the mapping for a file of all rows reads each source like its own mapping."""
    keys = {key: number for reading in corpus.readings for key, number in reading.keys.items()}
    if corpus.data.domain.per_file and DOMAIN_FIELD in keys:
        return False  # the domain comes from the file's name, but the key is taken
    try:
        merged = find_mapping(keys, corpus.data, "all sources together")
    except DatasetError:
        return False
    return all(
        set(reading.mapping.masks) <= set(merged.masks)
        and all(
            getattr(merged, meaning) == key or (key is None and meaning in OPTIONAL)
            for meaning, key in vars(reading.mapping).items()
            if meaning != "masks"
        )
        for reading in corpus.readings
    )


def _detect_form(reading: SourceReading, data: DataSection) -> Form:
    """The form for a source's rows: pair if they are only pairs of text."""
    mapping = reading.mapping
    if mapping.text:
        return "text"
    more = (mapping.messages, mapping.history, mapping.tools, mapping.label, mapping.masks)
    first = next(read_usable_rows(reading.source, mapping, data, DataNotes()), None)
    return "messages" if any(more) or (first and not _is_pair(first[1])) else "pair"


def _is_pair(example: Example) -> bool:
    """Whether an example is a text prompt and answer, optionally after a system message."""
    roles = tuple(message.role for message in example.messages)
    return roles in (("user", "assistant"), ("system", "user", "assistant")) and not example.messages[-1].calls


def _refuse_some_without_domain(corpus: Corpus) -> None:
    if corpus.data.domain.per_file:
        return
    have: dict[bool, SourceReading] = {bool(r.mapping.domain): r for r in reversed(corpus.readings)}
    if len(have) == 2:
        raise DatasetError(
            f"{have[True].source.name} has domains, {have[False].source.name} has none: one file cannot hold both. Set "
            "data.domain.field=null to leave them out, or data.domain.per_file=true."
        )


def build_reading_settings(form: Form, data: DataSection) -> DataSection:
    """The data section that reads the written rows: unchanged, except for rewritten names and CSV settings."""
    changed: dict[str, Any] = {"csv": CsvSection()}
    if form != "as_read" or data.domain.per_file:
        changed["domain"] = DomainSection(style=data.domain.style)
    if form != "as_read":
        changed["fields"] = FieldsSection()
    return data.model_copy(update=changed)


def convert_row(row: Row, example: Example, form: Form, per_file_domain: bool) -> dict[str, Any]:
    """The values to write for a row; `example` is as read, end marks included.

    Raises:
        DatasetError: it cannot be written in this form; names the row.
    """
    domain = {} if example.domain is None else {DOMAIN_FIELD: example.domain}
    if form == "as_read":
        return {**row.values, **(domain if per_file_domain else {})}
    values: dict[str, Any]
    if form == "text":
        values = {"text": example.messages[0].text}
    elif form == "pair":
        values = _convert_pair(row, example)
    else:
        _refuse_input(row, example)
        values = {"messages": [_convert_message(message) for message in example.messages]}
        values |= {"tools": json.dumps(example.tools, ensure_ascii=False)} if example.tools else {}
    return {**values, **domain}


def _refuse_input(row: Row, example: Example) -> None:
    second = next((message.input for message in example.messages if message.input), None)
    if second is not None:
        raise DatasetError(
            f"{row.place}: has the input {second[:40]!r} beside its prompt, for which the chats that are written "
            "have no place. Take prepare.format=jsonl, or prepare pairs and chats apart, each with its own "
            "prepare.output, and train on both."
        )


def _convert_pair(row: Row, example: Example) -> dict[str, str]:
    if not _is_pair(example):
        raise DatasetError(
            f"{row.place}: holds a chat, the first row of its file a pair of prompt and answer: columns of one type "
            "cannot hold both. Take prepare.format=jsonl, or put them into two files."
        )
    *system, asked, answer = example.messages
    values = {"system": system[0].text} if system else {}
    values |= {"instruction": asked.text} | ({"input": asked.input} if asked.input else {})
    return {**values, "output": answer.text}


def _convert_message(message: Message) -> dict[str, Any]:
    """A message in OpenAI's format; arguments of calls are JSON text."""
    content = None if message.null_content else message.text
    values: dict[str, Any] = {"role": message.role, "content": content, **message.extra}
    if not message.learn:
        values["loss_weight"] = 0
    for call in message.calls:
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        identity = {"id": call["id"]} if "id" in call else {}
        values.setdefault("tool_calls", []).append({**identity, "type": "function", "function": function})
    return values


def open_writer(path: Path, form: Form, has_domain: bool, learned: Collection[str] = ()) -> _RowWriter:
    """A writer by the path's ending: .jsonl, or .parquet with the columns of `form`; complete after `close`.

    Args:
        learned: keys whose NaN or infinity is refused; under other keys it becomes null, and `emptied` counts it.

    Raises:
        DatasetError: in `write`: the format cannot hold a value; names the row.
    """
    return _ParquetWriter(path, form, has_domain) if path.suffix == ".parquet" else _JsonlWriter(path, learned)


class _JsonlWriter:
    def __init__(self, path: Path, learned: Collection[str]) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._learned = learned
        self.emptied: Counter[str] = Counter()

    def write(self, row: Row, values: Mapping[str, Any]) -> None:
        try:
            line = _encode_json(values)
        except ValueError:  # NaN or infinity, in pandas and Parquet often a missing value
            finite = {key: _replace_non_finite(value) for key, value in values.items()}
            emptied = [key for key, value in values.items() if finite[key] != value]
            learned = next((key for key in emptied if key in self._learned), None)
            if learned is not None:
                raise DatasetError(
                    f"{row.place}: '{learned}' holds NaN or infinity, for which JSON has no word. Fix it."
                ) from None
            self.emptied.update(emptied)
            line = _encode_json(finite)
        except TypeError as error:
            raise DatasetError(
                f"{row.place}: JSON cannot hold all of its values ({error}). With prepare.format=parquet what is "
                "learned is written alone."
            ) from error
        self._file.write(line + "\n")

    def close(self) -> None:
        self._file.close()


def _replace_non_finite(value: Any) -> Any:
    """The value with null for every non-finite number."""
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encode_json(values: Mapping[str, Any]) -> str:
    """The values in JSON without ASCII escapes, unless UTF-8 cannot encode them."""
    line = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(values)
    return line


class _ParquetWriter:
    def __init__(self, path: Path, form: Form, has_domain: bool) -> None:
        import pyarrow.parquet as pq

        self._schema = _build_schema(form, has_domain)
        self._file = pq.ParquetWriter(path, self._schema)
        self._chunk: list[Mapping[str, Any]] = []
        self.emptied: Counter[str] = Counter()  # other keys are left out

    def write(self, row: Row, values: Mapping[str, Any]) -> None:
        self._chunk.append(values)
        self._last = row.place
        if len(self._chunk) == CHUNK:
            self._flush_chunk()

    def close(self) -> None:
        if self._chunk:
            self._flush_chunk()
        self._file.close()

    def _flush_chunk(self) -> None:
        import pyarrow as pa

        try:
            self._file.write_table(pa.Table.from_pylist(self._chunk, schema=self._schema))
        except pa.ArrowException as error:
            raise DatasetError(
                f"{self._last}, or one of the {len(self._chunk) - 1} rows before it: Parquet cannot hold all of its "
                f"values ({error}). Fix the row, or take prepare.format=jsonl."
            ) from error
        self._chunk = []


_RowWriter = _JsonlWriter | _ParquetWriter


def _build_schema(form: Form, has_domain: bool) -> Any:
    import pyarrow as pa

    text = pa.string()
    call = pa.struct([("id", text), ("type", text), ("function", pa.struct([("name", text), ("arguments", text)]))])
    message = [("role", text), ("content", text), ("name", text), ("tool_call_id", text)]
    message += [("loss_weight", pa.int8()), ("tool_calls", pa.list_(call))]
    columns: dict[str, list[tuple[str, Any]]] = {
        "text": [("text", text)],
        "pair": [(name, text) for name in ("system", "instruction", "input", "output")],
        "messages": [("messages", pa.list_(pa.struct(message))), ("tools", text)],
    }
    return pa.schema([*columns[form], *([(DOMAIN_FIELD, text)] if has_domain else [])])
