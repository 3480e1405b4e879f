"""Sources to examples: the keys of their rows, how these are read, and each row as an example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from training_lens.config.data_sections import DataSection
from training_lens.data.bad_rows import BadRowRule, bad_rows_error, describe_bad_rows, refuse_unusable_sources
from training_lens.data.examples import Example, Row
from training_lens.data.fields import FieldMapping, find_mapping, keys_of
from training_lens.data.notes import DataNotes
from training_lens.data.row_reader import RowReader, strip_end_marks
from training_lens.data.sources import Source, expand
from training_lens.errors import DatasetError
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def present_keys(source: Source, data: DataSection) -> dict[str, int]:
    """The keys of a source's rows, all of which are read: a key may show first in the last row.

    Raises:
        DatasetError: an empty source, or as `Source.rows`.
    """
    rule = BadRowRule.from_data(data, DataNotes())
    keys = keys_of(source.rows(data.csv, partial(rule.note, source.name) if rule.skips else None))
    if not keys:
        refuse_unusable_sources(rule.notes, {})
        raise DatasetError(f"{source.name}: holds no rows.")
    return keys


def mapping_of(source: Source, data: DataSection) -> FieldMapping:
    """How the rows of a source are read.

    Raises:
        DatasetError: as `present_keys` and `fields.find_mapping`.
    """
    return find_mapping(present_keys(source, data), data, source.name)


def usable_rows(
    source: Source, mapping: FieldMapping, data: DataSection, notes: DataNotes
) -> Iterator[tuple[Row, Example]]:
    """Each row and its example as it stands there; with data.on_bad_row=skip, rows that cannot be used are left out.

    Raises:
        DatasetError: as `Source.rows` and `RowReader.read`.
    """
    rule = BadRowRule.from_data(data, notes)
    on_bad_row = partial(rule.note, source.name) if rule.skips else None
    reader = RowReader(mapping, data, source.name, notes)
    for row in source.rows(data.csv, on_bad_row, partial(notes.say, source.name)):
        example = rule.try_row(source.name, row.number, partial(reader.read, row))
        if example is not None:
            yield row, example


def usable_examples(source: Source, data: DataSection, notes: DataNotes) -> Iterator[Example]:
    """The examples of one source as they are trained on; how it was read, and what was set aside, goes to `notes`.

    Raises:
        DatasetError: as `mapping_of` and `usable_rows`: of bad rows, the first.
    """
    mapping = mapping_of(source, data)
    notes.mapping(source.name, mapping.describe())
    for _, example in usable_rows(source, mapping, data, notes):
        if not data.strip_end_marks:
            yield example
            continue
        stripped, marks = strip_end_marks(example)
        for mark in marks:
            notes.end_mark(source.name, mark)
        yield stripped


def examples_of(source: Source, data: DataSection, notes: DataNotes | None = None) -> Iterator[Example]:
    """As `usable_examples`, but the error names all bad rows, and a source of nothing else is one.

    Raises:
        DatasetError: an empty source, rows that cannot be read or used, fields that cannot be told.
    """
    notes, usable = notes or DataNotes(), 0
    try:
        for example in usable_examples(source, data, notes):
            usable += 1
            yield example
    except DatasetError as error:
        raise (_error_of_all_rows(source, data) or error) from error
    if not usable:
        refuse_unusable_sources(notes, {})


def _error_of_all_rows(source: Source, data: DataSection) -> DatasetError | None:
    """What is wrong with the source's rows, found by reading them all; None where the source itself is at fault."""
    notes = DataNotes()
    try:
        usable = sum(1 for _ in usable_examples(source, skip_bad_rows(data), notes))
    except DatasetError as error:
        return error
    return bad_rows_error(notes, {source.name: usable})


def skip_bad_rows(data: DataSection) -> DataSection:
    """The settings, with data.on_bad_row=skip."""
    return data.model_copy(update={"on_bad_row": "skip"})


def read_examples(specs: Sequence[str], key: str, data: DataSection) -> Iterator[Example]:
    """The examples of these sources as they are, for showing and for generating answers; rows left out are logged."""
    for source in expand(specs, key):
        notes = DataNotes()
        yield from examples_of(source, data, notes)
        for line in describe_bad_rows(notes.reasons):
            logger.warning("%s: %s", key, line)
