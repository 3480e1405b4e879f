"""Tokenized examples on disk: one memory-mapped Arrow file per split, see `token_file`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training_lens.data.columns import EncodedRows, TokenizedRows, compute_offsets
from training_lens.data.examples import TokenizedExample
from training_lens.data.row_identity import IDENTITY_COLUMNS
from training_lens.data.token_file import TokenFile, TokenTable, checksums_path, compute_file_checksums
from training_lens.errors import DatasetError
from training_lens.utils.integrity import write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
# Tokens come last, so that everything read at opening is contiguous.
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("supervised", pa.int32()),
        ("domain", pa.string()),
        ("digest", pa.uint64()),
        ("identity", pa.list_(pa.uint64(), IDENTITY_COLUMNS)),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
    ]
)


def write_examples(path: Path, chunks: Iterable[TokenizedRows]) -> None:
    """Write chunks of examples as record batches, then their checksums; one chunk in memory at a time."""
    ends: list[int] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for chunk in filter(len, chunks):
            writer.write_batch(_record_batch(chunk))
            ends.append(sink.tell())
    write_sealed(checksums_path(path), asdict(compute_file_checksums(path, ends)))


def _record_batch(rows: TokenizedRows) -> pa.RecordBatch:
    """The rows as Arrow, built from buffers: `pa.array` would first import pandas (0.3 s)."""
    flags = pa.py_buffer(np.packbits(rows.loss_mask, bitorder="little"))
    mask = pa.Array.from_buffers(pa.bool_(), len(rows.loss_mask), [None, flags])
    ids = _build_number_array(rows.input_ids, pa.int32())
    offsets = pa.py_buffer(rows.offsets.astype(np.int32))
    return pa.record_batch(
        [
            _build_string_array(rows.files),
            _build_number_array(rows.numbers, pa.int64()),
            _build_number_array(rows.supervised_counts.astype(np.int32), pa.int32()),
            _build_string_array(rows.domains),
            _build_number_array(rows.digests, pa.uint64()),
            pa.FixedSizeListArray.from_arrays(
                _build_number_array(rows.identities.ravel(), pa.uint64()), type=SCHEMA.field("identity").type
            ),
            pa.Array.from_buffers(pa.list_(pa.int32()), len(rows), [None, offsets], children=[ids]),
            pa.Array.from_buffers(pa.list_(pa.bool_()), len(rows), [None, offsets], children=[mask]),
        ],
        schema=SCHEMA,
    )


def _build_number_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _build_string_array(values: Sequence[str | None]) -> pa.Array:
    """Strings; None is null."""
    encoded = [b"" if value is None else value.encode() for value in values]
    offsets = compute_offsets(np.fromiter(map(len, encoded), np.int64, len(encoded))).astype(np.int32)
    there = np.packbits(np.array([value is not None for value in values], dtype=bool), bitorder="little")
    buffers = [pa.py_buffer(there), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def _read_numbers(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Numbers without nulls, of one piece without a copy. `to_numpy` would first import pandas (0.3 s)."""
    return np.from_dlpack(values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values)


def _read_flags(values: pa.Array) -> np.ndarray:
    """Booleans without nulls."""
    bits = np.frombuffer(values.buffers()[1], np.uint8)
    return np.unpackbits(bits, count=values.offset + len(values), bitorder="little")[values.offset :].view(bool)


@dataclass(frozen=True)
class TokenDataset:
    """Examples by index; `rows` selects and orders rows of the source, None takes all."""

    source: TokenTable
    rows: np.ndarray | None = None

    @classmethod
    def open(cls, path: Path | str, rebuild: Callable[[], object] | None = None) -> TokenDataset:
        """The examples of a file; arguments and errors are those of `TokenFile`."""
        return cls(TokenFile(Path(path), rebuild))

    @classmethod
    def from_examples(cls, examples: Sequence[TokenizedExample]) -> TokenDataset:
        """Examples in memory as a dataset."""
        return cls(TokenTable(pa.Table.from_batches([_record_batch(TokenizedRows.from_examples(examples))])))

    @property
    def table(self) -> Any:
        return self.source.table

    def __len__(self) -> int:
        return self.table.num_rows if self.rows is None else len(self.rows)

    def example_id(self, index: int) -> str:
        """The id of one example, without reading its tokens."""
        row = self._source_row(index)
        return f"{self.table.column('file')[row].as_py()}:{self.table.column('row')[row].as_py()}"

    def _source_row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    def __getitem__(self, index: int) -> TokenizedExample:
        row = self._source_row(index)
        self.source.require_tokens(row)
        file, number, ids, mask, domain, digest = (
            self.table.column(name)[row] for name in ("file", "row", "input_ids", "loss_mask", "domain", "digest")
        )
        return TokenizedExample(
            file.as_py(),
            number.as_py(),
            _read_numbers(ids.values),
            _read_flags(mask.values),
            domain.as_py(),
            digest.as_py(),
        )

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[i] for i in range(len(self)))

    def spread_positions(self, most: int) -> np.ndarray:
        """At most so many positions, spread evenly from the first example to the last, int64."""
        positions: np.ndarray = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64))
        return positions

    def select(self, positions: np.ndarray) -> TokenDataset:
        """The examples at these positions, in this order; nothing is copied."""
        return TokenDataset(self.source, positions if self.rows is None else self.rows[positions])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64."""
        return self._pick_rows(_read_numbers(pc.list_value_length(self.table.column("input_ids")))).astype(np.int64)

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """Targets of each example, int64: tokens in the loss mask except the first, which nothing predicts."""
        return self._pick_rows(_read_numbers(self.table.column("supervised"))).astype(np.int64)

    @cached_property
    def digests(self) -> np.ndarray:
        """A hash of each example's rendered text, uint64: equal for duplicates."""
        return self._pick_rows(_read_numbers(self.table.column("digest")))

    @cached_property
    def identities(self) -> np.ndarray:
        """The hashes of each example, (examples, IDENTITY_COLUMNS) uint64, as in `row_identity.RowIdentity.columns`.

        Raises:
            DatasetError: an earlier version wrote the file, without them.
        """
        if "identity" not in self.table.column_names:
            raise DatasetError("the tokens are those of an earlier version, which kept no hashes of questions.")
        flat = _read_numbers(pc.list_flatten(self.table.column("identity")))
        return self._pick_rows(flat.reshape(-1, IDENTITY_COLUMNS))

    def iterate_columns(self) -> Iterator[tuple[np.ndarray, EncodedRows]]:
        """The examples in chunks, in the order of the source: their positions here, and their tokens with loss masks.

        For what is counted over all tokens: nothing is copied but the chunk at hand.
        """
        places = np.full(self.table.num_rows, -1, dtype=np.int64)
        places[slice(None) if self.rows is None else self.rows] = np.arange(len(self))
        start = 0
        for number in range(self.table.column("input_ids").num_chunks):
            self.source.require_tokens(start)
            ids, mask = (self.table.column(name).chunk(number) for name in ("input_ids", "loss_mask"))
            chosen = places[start : start + len(ids)]
            offsets = _read_numbers(ids.offsets).astype(np.int64)
            inside = slice(offsets[0], offsets[-1])
            rows = EncodedRows(
                _read_numbers(ids.values)[inside], _read_flags(mask.values)[inside], offsets - offsets[0]
            )
            yield chosen[chosen >= 0], rows.select_examples(chosen >= 0)
            start += len(ids)

    @cached_property
    def files(self) -> np.ndarray:
        """The source of each example."""
        return self._read_names("file")

    @cached_property
    def row_numbers(self) -> np.ndarray:
        """The row number of each example in its source, int64."""
        return self._pick_rows(_read_numbers(self.table.column("row")))

    @property
    def ids(self) -> list[str]:
        """The id of each example, see `example_id`."""
        return [f"{file}:{number}" for file, number in zip(self.files, self.row_numbers.tolist(), strict=True)]

    @cached_property
    def domains(self) -> np.ndarray:
        """The domain of each example, or None."""
        return self._read_names("domain")

    def _read_names(self, column: str) -> np.ndarray:
        """A column of few distinct names as an object array that shares them; None for null."""
        encoded = self.table.column(column).combine_chunks().dictionary_encode("encode")
        names = np.array(encoded.dictionary.to_pylist(), dtype=object)
        return self._pick_rows(names[_read_numbers(encoded.indices)])

    def _pick_rows(self, values: np.ndarray) -> np.ndarray:
        taken: np.ndarray = values if self.rows is None else values[self.rows]
        return taken
