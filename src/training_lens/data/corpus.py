"""The rows of several sources, read again and again, and what is remembered of each in between."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.data.deduplication import fingerprint
from training_lens.data.fields import FieldMapping, find_mapping, strip_end_marks, to_example
from training_lens.data.preparation import present_keys
from training_lens.data.sources import Source
from training_lens.data.types import Example, Row
from training_lens.data.values import text_of
from training_lens.errors import DatasetError
from training_lens.utils.progress import Progress


@dataclass(frozen=True)
class Reading:
    """A source, the keys of its rows (each with the first row that has it), and how they are read.

    `stamp` is what `_stamp` gave when the source was first looked at.
    """

    source: Source
    keys: dict[str, int]
    mapping: FieldMapping
    stamp: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Corpus:
    """All rows of some sources; a row's position counts over all of them, from 0."""

    readings: tuple[Reading, ...]
    data: DataSection
    progress: Progress

    @classmethod
    def of(cls, sources: Sequence[Source], data: DataSection, progress: Progress) -> Corpus:
        """Look through the sources for how to read them.

        Raises:
            DatasetError: as `preparation.present_keys` and `fields.find_mapping`.
        """
        return cls(tuple(_reading(source, data) for source in sources), data, progress)

    def rows(self, title: str) -> Iterator[tuple[Row, Example]]:
        """Each row and its example as it stands there, a bounded number in memory; `title` is the progress bar's.

        Raises:
            DatasetError: as `Source.rows` and `fields.to_example`; or a source changed since it was first read.
        """
        with self.progress.task(title, sum(r.source.size_bytes for r in self.readings), "bytes") as advance:
            for reading in self.readings:
                _refuse_changed(reading)
                left = float(reading.source.size_bytes)
                for row in reading.source.rows():
                    example = to_example(row, reading.mapping, self.data.domain.per_file)
                    yield row, example
                    done = min(left, sum(len(message.text) for message in example.messages))
                    advance(done)
                    left -= done
                advance(left)

    def examples(self, title: str) -> Iterator[Example]:
        """The examples as they are trained on: without end marks, unless the setting keeps them."""
        strip = self.data.strip_end_marks
        return (strip_end_marks(example)[0] if strip else example for _, example in self.rows(title))


def _reading(source: Source, data: DataSection) -> Reading:
    stamp, keys = _stamp(source), present_keys(source)
    return Reading(source, keys, find_mapping(keys, data.fields, data.domain, source.name), stamp)


def _stamp(source: Source) -> tuple[tuple[int, int], ...]:
    """Size and time of the last change (ns) of the source's files."""
    return tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in source.files)


def _refuse_changed(reading: Reading) -> None:
    if _stamp(reading.source) != reading.stamp:
        raise DatasetError(f"{reading.source.name}: changed while it was read. Run it again when it is complete.")


@dataclass(frozen=True)
class Catalogue:
    """What is remembered of every row, by position: 48 bytes, no text.

    `whole`, `prompt` and `context` are as in `deduplication.Fingerprint`, without the domain; `domain` is an index into
    `domains`, of which the first is None; `group` is a hash of the group's name, 0 where none is asked for.
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

    def __len__(self) -> int:
        return len(self.whole)

    def stratum(self) -> np.ndarray:
        """A hash of each row's domain, (rows,) uint64; 0 where it has none."""
        hashes = [0 if name is None else _hash(name) for name in self.domains]
        of_rows: np.ndarray = np.array(hashes, dtype=np.uint64)[self.domain]
        return of_rows

    def row_id(self, position: int) -> str:
        """As `Example.id`: 'data/train.jsonl:17'."""
        return f"{self.files[self.file[position]]}:{self.number[position]}"


def catalogue_of(corpus: Corpus, group_field: str | None) -> Catalogue:
    """One pass over the rows.

    Raises:
        DatasetError: as `Corpus.rows`, or a row without the group field; names the row.
    """
    files: dict[str, int] = {}
    domains: dict[str | None, int] = {None: 0}
    file, domain, number = array("i"), array("i"), array("q")
    whole, prompt, context, group = array("Q"), array("Q"), array("Q"), array("Q")
    strip = corpus.data.strip_end_marks
    for row, example in corpus.rows("reading"):
        hashes = fingerprint(strip_end_marks(example)[0] if strip else example)
        file.append(files.setdefault(row.file, len(files)))
        number.append(row.number)
        domain.append(domains.setdefault(example.domain, len(domains)))
        whole.append(hashes.whole)
        prompt.append(hashes.prompt)
        context.append(hashes.context)
        group.append(_hash(text_of(row, group_field)) if group_field else 0)
    columns = (file, number, whole, prompt, context, domain, group)
    return Catalogue(list(files), list(domains), *(np.array(column) for column in columns))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
