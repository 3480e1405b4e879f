"""The captures of a run that trains in this process, for who reads them again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from training_lens.core.arrow import (
    MODULE,
    STEP,
    concat_tables,
    extract_complete_series,
    extract_series,
    require_measure,
    suggest_name,
)
from training_lens.core.lens_store import LensStore, table_folders
from training_lens.core.recording import Captures
from training_lens.core.segments import TableSegment, list_segments, read_schema, read_segment
from training_lens.core.types import Series
from training_lens.errors import LensError


class RunningCaptures(Captures):
    """What `LensStore` gives after a flush, without one: what is not on disk yet comes from memory.

    Reads a segment once (its vectors when they are asked for), and extracts each series once between two calls of
    `refresh`. Memory: the numbers of the tables that were asked for.

    Args:
        folder: of the captures.
        read_pending: gives, for each table, what builds the rows that are not flushed yet; see `LensWriter`.
    """

    def __init__(self, folder: Path, read_pending: Callable[[], Mapping[str, Callable[[], pa.Table]]]) -> None:
        self._store, self._read_pending = LensStore(folder), read_pending
        self.manifest = self._store.manifest
        self._headers: dict[Path, pa.Table] = {}
        self._columns: dict[Path, dict[str, pa.ChunkedArray]] = {}
        self.refresh()

    def refresh(self) -> None:
        """See what was captured since; until the next call, everything stays as it is now."""
        folders = table_folders(self._store.folder)
        self._segments = {folder.name: listed for folder in folders if (listed := list_segments(folder))}
        self._pending, self._built = dict(self._read_pending()), dict[str, pa.Table]()
        self._names = tuple(sorted({*self._store.tables(), *self._segments, *self._pending}))
        self._series: dict[str, dict[str, Series]] = {}
        self._points: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._whole_headers: dict[str, pa.Table] = {}
        self._measures: dict[str, tuple[str, ...]] = {}
        live = {segment.path for listed in self._segments.values() for segment in listed}
        for path in self._columns.keys() - live:  # merged into another one
            del self._columns[path]

    def tables(self) -> tuple[str, ...]:
        return self._names

    def measures(self, name: str) -> tuple[str, ...]:
        if name not in self._measures:
            columns = self._read_header(name).column_names
            self._measures[name] = tuple(column for column in columns if column not in (STEP, MODULE))
        return self._measures[name]

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        header = self._read_header(name)
        for column in columns or ():
            require_measure(header, column)
        wanted = [c for c in header.column_names if columns is None or c in (STEP, MODULE, *columns)]
        parts = [self._read_columns(segment, wanted) for segment in self._segments.get(name, ())]
        if name in self._pending:
            pending = self._build_pending(name)
            parts.append(pending.select([c for c in wanted if c in pending.column_names]))
        return concat_tables([header.select(wanted), *(part for part in parts if part is not None)])

    def series(self, table: str, measure: str) -> Series:
        if table not in self._series:
            self._series[table] = extract_complete_series(self.table(table, self._list_numbers(table)))
        known = self._series[table]
        if measure not in known:
            known[measure] = extract_series(self.table(table, [measure]), measure)
        return known[measure]

    def _list_numbers(self, name: str) -> list[str]:
        """The measures of a table that are not vectors."""
        schema = self._read_header(name).schema
        return [measure for measure in self.measures(name) if not pa.types.is_list(schema.field(measure).type)]

    def finite_points(self, table: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
        if (table, measure) not in self._points:
            self._points[table, measure] = super().finite_points(table, measure)
        return self._points[table, measure]

    def snapshot_steps(self, table: str) -> list[int]:
        return self._store.snapshot_steps(table)

    def snapshot(self, table: str, step: int) -> dict[str, Tensor]:
        return self._store.snapshot(table, step)

    def cost(self) -> dict[str, float]:
        return self._store.cost()

    def _read_header(self, name: str) -> pa.Table:
        """The columns of a table, without rows."""
        if name in self._whole_headers:
            return self._whole_headers[name]
        if name not in self._segments and name not in self._pending:
            raise LensError(f"{self._store.folder} has no table '{name}'.{suggest_name(name, self.tables())}")
        headers = []
        for segment in self._segments.get(name, ()):
            if segment.path not in self._headers:
                found = self._store.read_or_skip(segment, read_schema)
                self._headers[segment.path] = pa.table({}) if found is None else found
            headers.append(self._headers[segment.path])
        if name in self._pending:
            headers.append(self._build_pending(name).slice(0, 0))
        self._whole_headers[name] = concat_tables(headers)
        return self._whole_headers[name]

    def _build_pending(self, name: str) -> pa.Table:
        """The rows of a table that are not on disk yet; built once between two calls of `refresh`."""
        if name not in self._built:
            self._built[name] = self._pending[name]()
        return self._built[name]

    def _read_columns(self, segment: TableSegment, wanted: Sequence[str]) -> pa.Table | None:
        """These columns of a segment, as far as it has them; None if it is damaged.

        The first reading takes all numbers of the segment, as opening a file costs more than reading it.
        """
        known = self._columns.setdefault(segment.path, {})
        schema = self._headers[segment.path].schema
        asked = [c for c in wanted if c in schema.names]
        if not known.keys() >= set(asked):
            numbers = [field.name for field in schema if not pa.types.is_list(field.type)]
            missing = [c for c in dict.fromkeys((*numbers, *asked)) if c not in known]
            found = self._store.read_or_skip(segment, lambda s: read_segment(s, missing))
            if found is None:
                return None
            known.update({name: found.column(name) for name in found.column_names})
        return pa.table({name: known[name] for name in asked})
