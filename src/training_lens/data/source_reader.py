"""Sources to examples: collect the keys of a source, find its field mapping, read each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from training_lens.config.data_sections import DataSection
from training_lens.data.examples import Example, Row
from training_lens.data.fields import FieldMapping, collect_keys, find_mapping
from training_lens.data.file_readers import check_csv_settings
from training_lens.data.notes import BadRowRule, DataNotes, bad_rows_error, describe_bad_rows, refuse_unusable_sources
from training_lens.data.row_reader import RowReader, strip_end_marks
from training_lens.data.sources import DataSource, expand_sources
from training_lens.errors import DatasetError
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def read_keys(source: DataSource, data: DataSection) -> dict[str, int]:
    """The keys of a source's rows. Reads all of them: the last row may have a new key.

    Raises:
        DatasetError: an empty source, or as `Source.rows`.
    """
    rule = BadRowRule.from_data(data, DataNotes())
    on_bad_row = partial(rule.record_bad_row, source.name) if rule.skips else None
    keys = collect_keys(source.read_rows(data, on_bad_row))
    if not keys:
        refuse_unusable_sources(rule.notes, {})
        raise DatasetError(f"{source.name}: holds no rows.")
    return keys


def read_usable_rows(
    source: DataSource, mapping: FieldMapping, data: DataSection, notes: DataNotes
) -> Iterator[tuple[Row, Example]]:
    """Each row and its example, unchanged; with data.on_bad_row=skip, bad rows are left out.

    Raises:
        DatasetError: as `Source.rows` and `RowReader.read`.
    """
    rule = BadRowRule.from_data(data, notes)
    on_bad_row = partial(rule.record_bad_row, source.name) if rule.skips else None
    reader = RowReader(mapping, data, source.name, notes)
    for row in source.read_rows(data, on_bad_row, partial(notes.add_remark, source.name)):
        example = rule.try_row(source.name, row.number, partial(reader.read_row, row))
        if example is not None:
            yield row, example


def read_usable_examples(source: DataSource, data: DataSection, notes: DataNotes) -> Iterator[Example]:
    """The examples of one source as they are trained on; remarks on how it was read go to `notes`.

    Raises:
        DatasetError: as `read_keys`, `find_mapping` and `read_usable_rows`: of bad rows, the first.
    """
    mapping = find_mapping(read_keys(source, data), data, source.name)
    notes.mappings[source.name] = mapping.describe()
    for _, example in read_usable_rows(source, mapping, data, notes):
        if not data.strip_end_marks:
            yield example
            continue
        stripped, marks = strip_end_marks(example)
        notes.end_marks.update(marks)
        yield stripped


def read_source_examples(source: DataSource, data: DataSection, notes: DataNotes | None = None) -> Iterator[Example]:
    """Like `read_usable_examples`, but the error names all bad rows, and a source of only bad rows is an error.

    Raises:
        DatasetError: an empty source, bad rows, or ambiguous fields.
    """
    notes, usable = notes or DataNotes(), 0
    try:
        for example in read_usable_examples(source, data, notes):
            usable += 1
            yield example
    except DatasetError as error:
        notes = DataNotes()  # read all rows, to name all that are bad; this raises if the source itself is at fault
        usable = sum(1 for _ in read_usable_examples(source, skip_bad_rows(data), notes))
        raise (bad_rows_error(notes, {source.name: usable}) or error) from error
    if not usable:
        refuse_unusable_sources(notes, {})


def skip_bad_rows(data: DataSection) -> DataSection:
    """The settings, with data.on_bad_row=skip."""
    return data.model_copy(update={"on_bad_row": "skip"})


def read_examples(specs: Sequence[object], key: str, data: DataSection) -> Iterator[Example]:
    """The examples of these sources, for display and generation; skipped rows are logged."""
    sources = expand_sources(specs, key)
    try:
        check_csv_settings(data.csv, [source.name for source in sources])
    except DatasetError as error:  # they may be those of a run whose training rows are a table
        logger.info("%s: not used: %s", key, error)
    for source in sources:
        notes = DataNotes()
        yield from read_source_examples(source, data, notes)
        for line in describe_bad_rows(notes.bad_row_reasons):
            logger.warning("%s: %s", key, line)
