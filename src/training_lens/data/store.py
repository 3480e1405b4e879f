"""Tokenized examples on disk: one Arrow file a split, memory-mapped, kept under a fingerprint of all it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training_lens.data.columns import TokenizedRows, running
from training_lens.data.types import TokenizedExample

SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("supervised", pa.int32()),
        ("domain", pa.string()),
        ("digest", pa.uint64()),
    ]
)


def write_examples(path: Path, chunks: Iterable[TokenizedRows]) -> None:
    """Write chunks of examples as record batches; holds one chunk in memory at a time."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for chunk in chunks:
            writer.write_batch(_record_batch(chunk))


def _record_batch(rows: TokenizedRows) -> pa.RecordBatch:
    """The rows as Arrow, from their buffers: `pa.array` would import pandas first, for a third of a second."""
    ids, mask = _numbers(rows.input_ids, pa.int32()), _flags(rows.loss_mask)
    offsets = pa.py_buffer(rows.offsets.astype(np.int32))
    return pa.record_batch(
        [
            _texts(rows.files),
            _numbers(rows.numbers, pa.int64()),
            pa.Array.from_buffers(pa.list_(pa.int32()), len(rows), [None, offsets], children=[ids]),
            pa.Array.from_buffers(pa.list_(pa.bool_()), len(rows), [None, offsets], children=[mask]),
            _numbers(rows.supervised.astype(np.int32), pa.int32()),
            _texts(rows.domains),
            _numbers(rows.digests, pa.uint64()),
        ],
        schema=SCHEMA,
    )


def _numbers(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _flags(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))])


def _texts(values: Sequence[str | None]) -> pa.Array:
    """Strings; None is null."""
    encoded = [b"" if value is None else value.encode() for value in values]
    offsets = running(np.fromiter(map(len, encoded), np.int64, len(encoded))).astype(np.int32)
    there = np.packbits(np.array([value is not None for value in values], dtype=bool), bitorder="little")
    buffers = [pa.py_buffer(there), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


@dataclass(frozen=True)
class TokenDataset:
    """Examples of an Arrow file, read through a memory map; `rows` picks and orders them, None takes all."""

    table: pa.Table
    rows: np.ndarray | None = None

    @classmethod
    def open(cls, path: Path | str) -> TokenDataset:
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample]) -> TokenDataset:
        """Examples in memory as a dataset."""
        return cls(pa.Table.from_batches([_record_batch(TokenizedRows.of(examples))]))

    def __len__(self) -> int:
        return self.table.num_rows if self.rows is None else len(self.rows)

    def example_id(self, index: int) -> str:
        """The id of one example, without reading its tokens."""
        row = self._row(index)
        return f"{self.table.column('file')[row].as_py()}:{self.table.column('row')[row].as_py()}"

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    def __getitem__(self, index: int) -> TokenizedExample:
        row = self._row(index)
        file, number, ids, mask, domain, digest = (
            self.table.column(name)[row] for name in ("file", "row", "input_ids", "loss_mask", "domain", "digest")
        )
        return TokenizedExample(
            file.as_py(),
            number.as_py(),
            ids.values.to_numpy(),
            mask.values.to_numpy(zero_copy_only=False),
            domain.as_py(),
            digest.as_py(),
        )

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[i] for i in range(len(self)))

    def select(self, positions: np.ndarray) -> TokenDataset:
        """The examples at these positions, in this order; nothing is copied."""
        return TokenDataset(self.table, positions if self.rows is None else self.rows[positions])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self._taken(pc.list_value_length(self.table.column("input_ids")).to_numpy()).astype(np.int64)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Targets of each example, int64: masked-in tokens other than the first, which nothing predicts."""
        return self._taken(self.table.column("supervised").to_numpy()).astype(np.int64)

    @cached_property
    def digests(self) -> np.ndarray:
        """A hash of each example's rendered text, uint64: equal for examples that say the same."""
        return self._taken(self.table.column("digest").to_numpy())

    @cached_property
    def files(self) -> np.ndarray:
        """The source of each example."""
        return self._names("file")

    @cached_property
    def domains(self) -> np.ndarray:
        """The domain of each example, or None."""
        return self._names("domain")

    def _names(self, column: str) -> np.ndarray:
        """A column of few different names as an object array that shares them; None where there is none."""
        encoded = self.table.column(column).combine_chunks().dictionary_encode()
        names = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
        return self._taken(names[encoded.indices.fill_null(len(names) - 1).to_numpy()])

    def _taken(self, values: np.ndarray) -> np.ndarray:
        taken: np.ndarray = values if self.rows is None else values[self.rows]
        return taken
