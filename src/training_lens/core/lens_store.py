"""Reads a lens folder: at any time, also while training runs or after a kill. `LensWriter` fills it.

A folder holds lens.json (what its tables are about), files.json (the list of its files), cost.json (seconds by
collector), and a folder for each table with Parquet segments and snapshots. `lens.scalars_megabytes` and
`lens.snapshots_megabytes` limit its size; tables with one row per step, such as the loss, are never thinned. A number
takes 2.9 to 3.7 bytes: 12 measures take 35 to 45 bytes for each module and step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from training_lens.core.arrow import (
    MODULE,
    STEP,
    choose_columns,
    concat_tables,
    extract_complete_series,
    extract_series,
    polars_frame,
    suggest_name,
)
from training_lens.core.capture_files import LISTING, describe_loss, find_missing_captures, read_manifest
from training_lens.core.recording import Captures
from training_lens.core.segments import TableSegment, list_segments, read_schema, read_segment
from training_lens.core.snapshots import list_snapshots, read_snapshot, require_intact
from training_lens.core.table_names import STATES
from training_lens.core.types import Series
from training_lens.errors import DamagedFileError, LensError
from training_lens.utils.integrity import read_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
COST = "cost.json"
TABLE_NAME = re.compile(r"\w[\w.-]*")


class LensStore(Captures):
    """Reads the captures in a folder. Each call sees the current state, also while training runs.

    A damaged or missing file is skipped: logged once, and listed in `damaged`.

    Args:
        folder: RUN/lens, or another folder that a LensWriter filled.

    Raises:
        LensError: there are no captures, or this version cannot read their format.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.damaged: list[Path] = []
        try:
            for path in find_missing_captures(self.folder):
                self._skip_damaged(path, describe_loss(path))
        except LensError as error:
            self._skip_damaged(self.folder / LISTING, error)

    def tables(self) -> tuple[str, ...]:
        """The names of the tables that are not empty."""
        folders = table_folders(self.folder)
        return tuple(path.name for path in folders if list_segments(path) or list_snapshots(path))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A table with the columns step, module and its measures (see `arrow_table`), ascending by step.

        Args:
            columns: the measures to read; None: all. Step and module are always included.

        Raises:
            LensError: there is no such table, or no such measure in it.
        """
        segments = list_segments(self._table_folder(name))
        try:
            header = self._read_header(segments)
            wanted = choose_columns(header, columns)
            rows = [self.read_or_skip(segment, lambda s: read_segment(s, columns)) for segment in segments]
        except FileNotFoundError:  # merged into another segment after it was listed
            return self.table(name, columns)
        return concat_tables([header.select(wanted), *(table for table in rows if table is not None)])

    def measures(self, name: str) -> tuple[str, ...]:
        """The measures of a table, without reading its rows; raises as `table` does.

        A measure may have no rows left if the files that held them are damaged.
        """
        segments = list_segments(self._table_folder(name))
        try:
            header = self._read_header(segments)
        except FileNotFoundError:  # as in `table`
            return self.measures(name)
        return tuple(column for column in header.column_names if column not in (STEP, MODULE))

    def _read_header(self, segments: Sequence[TableSegment]) -> pa.Table:
        """The columns of all segments, as a table without rows."""
        headers = [self.read_or_skip(segment, read_schema) for segment in segments]
        return concat_tables([header for header in headers if header is not None])

    def read_or_skip(self, segment: TableSegment, read: Callable[[TableSegment], pa.Table]) -> pa.Table | None:
        """What `read` gives of a segment; None for a damaged one, which is logged once."""
        try:
            return read(segment)
        except LensError as error:
            self._skip_damaged(segment.path, error)
            return None

    def _skip_damaged(self, path: Path, why: LensError | str) -> None:
        if path not in self.damaged:
            self.damaged.append(path)
            logger.warning("%s", why)

    def _table_folder(self, table: str) -> Path:
        known = self.tables()
        if table not in known:
            raise LensError(f"{self.folder} has no table '{table}'.{suggest_name(table, known)}")
        return self.folder / table

    def pandas(self, name: str) -> Any:
        """A table as a pandas DataFrame; raises as `table` does."""
        return self.table(name).to_pandas()

    def polars(self, name: str) -> Any:
        """A table as a Polars DataFrame; raises as `table` does, and ConfigurationError where Polars is missing."""
        return polars_frame(self.table(name))

    def snapshot_steps(self, table: str) -> list[int]:
        """The steps of a table's intact snapshots, ascending; none if there is no such table."""
        return [step for step, path in list_snapshots(self.folder / table).items() if self._is_intact(path)]

    def _is_intact(self, path: Path) -> bool:
        try:
            require_intact(path)
        except LensError as error:
            self._skip_damaged(path, error)
            return False
        return True

    def snapshot(self, table: str, step: int) -> dict[str, Tensor]:
        """The tensors of a snapshot by name, on the CPU.

        Raises:
            LensError: there is no snapshot of that step, or it is damaged.
        """
        steps = list_snapshots(self._table_folder(table))
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise LensError(f"{self.folder / table} has no snapshot of step {step}; there are: {known}.")
        return read_snapshot(steps[step])

    def cost(self) -> dict[str, float]:
        """Seconds by collector; empty before the first flush.

        Raises:
            LensError: cost.json is damaged.
        """
        return read_cost(self.folder)


def read_cost(folder: Path) -> dict[str, float]:
    """See `LensStore.cost`."""
    path = folder / COST
    try:
        return {name: float(seconds) for name, seconds in read_sealed(path).items()} if path.is_file() else {}
    except (OSError, DamagedFileError, ValueError, TypeError) as error:
        raise LensError(f"{path} is damaged ({error}): delete it; nothing else needs it.") from error


def table_folders(folder: Path) -> list[Path]:
    """The folders of tables in a lens folder."""
    folders = (path for path in folder.iterdir() if path.is_dir() and path.name != STATES)
    return sorted(path for path in folders if TABLE_NAME.fullmatch(path.name))


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
        wanted = choose_columns(header, columns)
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
