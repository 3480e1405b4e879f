"""The rows of several sources, read in several passes, and a catalogue of their hashes."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.data.examples import Example, Row
from training_lens.data.fields import FieldMapping, find_mapping, unknown_field_error
from training_lens.data.notes import DataNotes
from training_lens.data.row_identity import IDENTITY_COLUMNS, identify_example
from training_lens.data.row_reader import strip_end_marks
from training_lens.data.source_reader import read_keys, read_usable_rows
from training_lens.data.sources import DataSource
from training_lens.data.values import read_text
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError
from training_lens.preparation.deduplication import fingerprint_example
from training_lens.utils.files import hash_bytes

Item = TypeVar("Item")
RowNumbers = Mapping[str, Collection[int]]  # by source


@dataclass(frozen=True)
class SourceReading:
    """A source, its keys (each with the first row that has it), and its field mapping.

    `stamp` (as `_stamp_files`) and `sha256` were taken before anything was read.
    """

    source: DataSource
    keys: dict[str, int]
    mapping: FieldMapping
    stamp: tuple[tuple[int, int], ...]
    sha256: str

    @property
    def size_bytes(self) -> int:
        return sum(size for size, _ in self.stamp)


@dataclass(frozen=True)
class Corpus:
    """All rows of some sources; a row's position counts across all of them, from 0."""

    readings: tuple[SourceReading, ...]
    data: DataSection
    progress: Progress
    left_out: RowNumbers = field(default_factory=dict)

    @classmethod
    def from_sources(
        cls, sources: Sequence[DataSource], data: DataSection, progress: Progress, left_out: RowNumbers | None = None
    ) -> Corpus:
        """Find the field mapping of each source.

        Args:
            left_out: source -> row numbers to skip.

        Raises:
            DatasetError: as `source_reader.read_keys` and `fields.find_mapping`.
        """
        readings = []
        for source in sources:
            stamp, sha256 = _stamp_files(source), source.sha256
            keys = read_keys(source, data)
            readings.append(SourceReading(source, keys, find_mapping(keys, data, source.name), stamp, sha256))
        return cls(tuple(readings), data, progress, left_out or {})

    def read_rows(self, title: str, notes: DataNotes | None = None) -> Iterator[tuple[Row, Example]]:
        """Each row and its example, unchanged and streamed; `title` is the progress bar's.

        Args:
            notes: collects remarks on the sources.

        Raises:
            DatasetError: as `source_reader.read_usable_rows`; or a source changed between passes.
        """
        notes = notes or DataNotes()
        with self.progress.task(title, sum(r.size_bytes for r in self.readings), "bytes") as advance:
            for reading in self.readings:
                _refuse_changed(reading)
                left = float(reading.size_bytes)
                left_out = self.left_out.get(reading.source.name, ())
                for row, example in read_usable_rows(reading.source, reading.mapping, self.data, notes):
                    if row.number in left_out:
                        continue
                    yield row, example
                    done = min(left, sum(len(message.text) for message in example.messages))
                    advance(done)
                    left -= done
                advance(left)
                _refuse_changed(reading)

    def require_unchanged(self) -> None:
        """Check that no source changed while it was read. Hashes all files again.

        Raises:
            DatasetError: a source changed; names it.
        """
        for reading in self.readings:
            _refuse_changed(reading)
            if reading.source.sha256 != reading.sha256:
                raise _changed_error(reading.source.name)

    def read_examples(self, title: str) -> Iterator[Example]:
        """The examples as they are trained on: without end marks, unless data.strip_end_marks=false."""
        strip = self.data.strip_end_marks
        return (strip_end_marks(example)[0] if strip else example for _, example in self.read_rows(title))


def _stamp_files(source: DataSource) -> tuple[tuple[int, int], ...]:
    """Size and modification time (ns) of the source's files."""
    try:
        return tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in source.files)
    except FileNotFoundError as error:
        raise _changed_error(source.name) from error


def _refuse_changed(reading: SourceReading) -> None:
    if _stamp_files(reading.source) != reading.stamp:
        raise _changed_error(reading.source.name)


def _changed_error(name: str) -> DatasetError:
    return DatasetError(f"{name}: changed while it was read. Run it again when it is complete.")


@dataclass(frozen=True)
class RowCatalogue:
    """Hashes and origin of every row, by position: 88 bytes each, no text.

    `whole`, `prompt` and `context` are as in `deduplication.Fingerprint`, `identity` (rows, IDENTITY_COLUMNS) as in
    `row_identity.RowIdentity.columns`; `domain` is an index into `domains`, the
    first of which is None; `group` is a hash of the group's name, 0 without a group field.
    """

    files: list[str]
    domains: list[str | None]
    file: np.ndarray
    number: np.ndarray
    whole: np.ndarray
    prompt: np.ndarray
    context: np.ndarray
    domain: np.ndarray
    group: np.ndarray
    identity: np.ndarray

    def __len__(self) -> int:
        return len(self.whole)

    def enumerate_rows(self, items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """Enumerate the items of a later pass over the rows.

        Raises:
            DatasetError: there are more rows than before: a source grew.
        """
        for position, item in enumerate(items):
            if position == len(self):
                raise _changed_error(self.files[-1])
            yield position, item

    def hash_domains(self) -> np.ndarray:
        """A hash of each row's domain, (rows,) uint64; 0 without a domain."""
        hashes = [0 if name is None else hash_bytes(name.encode()) for name in self.domains]
        return np.take(np.array(hashes, dtype=np.uint64), self.domain)

    def find_rows_of(self, files: Collection[str]) -> np.ndarray:
        """Which rows come from these files, (rows,) bool."""
        places = [place for place, name in enumerate(self.files) if name in files]
        is_of: np.ndarray = np.isin(self.file, places)
        return is_of

    def row_id(self, position: int) -> str:
        """As `Example.id`: 'data/train.jsonl:17'."""
        return f"{self.files[self.file[position]]}:{self.number[position]}"


def build_catalogue(corpus: Corpus, group_field: str | None, notes: DataNotes | None = None) -> RowCatalogue:
    """Build the catalogue in one pass over the rows; `notes` collects remarks on the sources.

    Raises:
        DatasetError: as `Corpus.read_rows`; a source without the group field, or a row; names it.
    """
    for reading in corpus.readings if group_field else ():
        if group_field not in reading.keys:
            raise unknown_field_error("prepare.group_field", str(group_field), reading.keys, reading.source.name)
    files: dict[str, int] = {}
    domains: dict[str | None, int] = {None: 0}
    file, domain, number = array("i"), array("i"), array("q")
    whole, prompt, context, group, identity = (array("Q") for _ in range(5))
    strip = corpus.data.strip_end_marks
    for row, example in corpus.read_rows("reading", notes):
        learned = strip_end_marks(example)[0] if strip else example
        hashes = fingerprint_example(learned)
        identity.extend(identify_example(learned).columns)
        file.append(files.setdefault(row.file, len(files)))
        number.append(row.number)
        domain.append(domains.setdefault(example.domain, len(domains)))
        whole.append(hashes.whole)
        prompt.append(hashes.prompt)
        context.append(hashes.context)
        group.append(hash_bytes(read_text(row, group_field).encode()) if group_field else 0)
    columns = (file, number, whole, prompt, context, domain, group)
    arrays = [*map(np.array, columns), np.array(identity, dtype=np.uint64).reshape(-1, IDENTITY_COLUMNS)]
    return RowCatalogue(list(files), list(domains), *arrays)
