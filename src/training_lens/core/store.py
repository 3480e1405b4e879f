"""The lens's store: captures written while training runs, and read at any time, also then or after a kill.

A folder holds lens.json (what its tables are about), cost.json (seconds by collector), and a folder for each table with
its Parquet segments and its snapshots. `lens.scalars_megabytes` and `lens.snapshots_megabytes` bound its size; tables
of one row a step, as that of the loss, are kept whole. Before anything is thinned, a number takes 2.9 to 3.7 bytes: of
12 measures, 35 to 45 bytes for each module and step.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from torch import Tensor

from training_lens.config.lens_section import LensSection
from training_lens.core.arrow import (
    MODULE,
    STEP,
    Packed,
    arrow_table,
    joined,
    meant,
    pack,
    polars_frame,
    require_measure,
    series_of,
    table_of,
    vectors_of,
)
from training_lens.core.manifest import read_manifest, write_manifest
from training_lens.core.segments import Segment, SegmentedTable, bound, empty_segment, read_segment, segments_in
from training_lens.core.snapshots import Snapshots, read_snapshot, require_whole, snapshots_in
from training_lens.core.types import Captured, LensManifest, Series
from training_lens.errors import LensError
from training_lens.utils.files import read_json, sweep_temporaries, write_json
from training_lens.utils.logging import get_logger

__all__ = ["LensStore", "LensWriter", "arrow_table", "series_of", "vectors_of"]
logger = get_logger(__name__)
COST = "cost.json"
MEGABYTE = 1_000_000
MOST_PENDING = 8 * MEGABYTE
TABLE_NAME = re.compile(r"\w[\w.-]*")


class LensWriter:
    """Writes the captures of one run; the one writer of its folder.

    Args:
        folder: made where it is missing.
        manifest: written as lens.json.
        section: how much room captures may take, and how often they go to disk.
        after_step: the step that training goes on after: captures of later steps are dropped; 0: all are.

    Raises:
        LensError: the folder cannot be written.
    """

    def __init__(self, folder: Path, manifest: LensManifest, section: LensSection, after_step: int = 0) -> None:
        self._folder = folder
        self._limit_bytes = section.scalars_megabytes * MEGABYTE
        self._flush_seconds = section.flush_seconds
        self._pending: dict[str, list[Packed]] = {}
        self._pending_bytes = 0
        self._bytes_written = 0
        self._flushed_at = time.monotonic()
        self._kept_steps = after_step or -1  # a fresh start drops step 0 as well
        with _writing_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(folder, older_than_seconds=0)
            if not after_step:
                (folder / COST).unlink(missing_ok=True)
            self._tables = {path.name: SegmentedTable(path, self._kept_steps) for path in _table_folders(folder)}
            self._snapshots = Snapshots(folder, section.snapshots_megabytes * MEGABYTE, self._kept_steps)
            write_manifest(folder, manifest)

    def cost(self) -> dict[str, float]:
        """Seconds by collector that earlier parts of the run took."""
        return read_cost(self._folder)

    @property
    def bytes_written(self) -> int:
        """All bytes of segments and snapshots that this writer wrote, merges among them."""
        return self._bytes_written

    @property
    def size(self) -> int:
        """Bytes of segments and snapshots on disk."""
        return sum(table.size for table in self._tables.values()) + self._snapshots.size

    def add(self, table: str, step: int, captured: Captured) -> None:
        """Keep what a collector saw for the next flush, copied: it may be changed afterwards.

        Scalars and vectors stay on their device, and nothing waits for it; a snapshot's tensors are copied to the CPU,
        which does.

        Raises:
            LensError: values that do not fit their rows, or a table's name that is not one of a folder.
        """
        if table not in self._pending:
            self._begin(table)
        try:
            packed = pack(step, captured)
        except LensError as error:
            raise LensError(f"{table}: {error}") from error
        self._pending[table].append(packed)
        self._pending_bytes += packed.nbytes
        if captured.tensors:
            self._snapshots.add(table, step, captured.tensors)

    def _begin(self, table: str) -> None:
        if not TABLE_NAME.fullmatch(table):
            raise LensError(f"'{table}' cannot name a table: give letters, digits, '_', '-' and '.', as in a folder.")
        self._pending[table] = []

    def flush_if_due(self, cost: Mapping[str, float] | None = None) -> None:
        """Flush where `lens.flush_seconds` have passed since the last time, or much is pending; raises as that does."""
        pending = self._pending_bytes + self._snapshots.pending_bytes
        too_much = pending > min(MOST_PENDING, self._limit_bytes / 8)  # an eighth: the newest are never thinned
        if too_much or time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush(cost)

    def flush(self, cost: Mapping[str, float] | None = None) -> None:
        """Write what is pending, then merge and thin where bounds ask for it. Waits for the device, once a table.

        Args:
            cost: seconds by collector so far, kept as cost.json.

        Raises:
            LensError: it cannot be written, for one because the disk is full. What is on disk stays readable, and what
                could not be written stays pending.
        """
        self._flushed_at = time.monotonic()
        with _writing_in(self._folder):
            for table in self._pending:
                self._flush_table(table)
            self._bytes_written += self._snapshots.flush()
            if cost is not None:
                write_json(self._folder / COST, dict(cost))
            self._bytes_written += bound(self._tables.values(), self._limit_bytes)

    def _flush_table(self, table: str) -> None:
        pending = self._pending[table]
        rows = table_of(pending)
        if rows.num_rows:
            if table not in self._tables:
                self._tables[table] = SegmentedTable(self._folder / table, self._kept_steps)
            self._bytes_written += self._tables[table].append(rows)
        self._pending_bytes -= sum(packed.nbytes for packed in pending)
        pending.clear()

    def close(self, cost: Mapping[str, float] | None = None) -> None:
        """Flush for the last time.

        Raises:
            LensError: see `flush`.
        """
        self.flush(cost)


class LensStore:
    """Reads the captures in a folder, as they are at each call: training may go on meanwhile.

    A damaged file is passed over: logged once, and listed in `damaged`.

    Args:
        folder: RUN/lens, or another that a LensWriter filled.

    Raises:
        LensError: there are no captures, or of a format that this version cannot read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.damaged: list[Path] = []

    def tables(self) -> tuple[str, ...]:
        """The tables that hold something, by name."""
        folders = _table_folders(self.folder)
        return tuple(path.name for path in folders if segments_in(path) or snapshots_in(path))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A table with its columns step, module and those of its measures (see `arrow_table`), ascending by step.

        Args:
            columns: the measures to read; None: all. Step and module always come.

        Raises:
            LensError: there is no such table, or no such measure in it.
        """
        segments = segments_in(self._folder_of(name))
        try:
            header = self._header(segments)
            for column in columns or ():
                if column not in header.column_names:
                    require_measure(header, column)
            rows = [self._read(segment, lambda s: read_segment(s, columns)) for segment in segments]
        except FileNotFoundError:  # merged into another between listing and reading
            return self.table(name, columns)
        wanted = [c for c in header.column_names if columns is None or c in (STEP, MODULE, *columns)]
        return joined([header.select(wanted), *(table for table in rows if table is not None)])

    def measures(self, name: str) -> tuple[str, ...]:
        """The measures of a table, without reading its rows; raises as `table` does.

        One may have no rows left, where the files that held it are damaged.
        """
        segments = segments_in(self._folder_of(name))
        try:
            header = self._header(segments)
        except FileNotFoundError:  # as in `table`
            return self.measures(name)
        return tuple(column for column in header.column_names if column not in (STEP, MODULE))

    def _header(self, segments: Sequence[Segment]) -> pa.Table:
        """The columns of all segments, without rows."""
        headers = [self._read(segment, empty_segment) for segment in segments]
        return joined([header for header in headers if header is not None])

    def _read(self, segment: Segment, read: Callable[[Segment], pa.Table]) -> pa.Table | None:
        try:
            return read(segment)
        except LensError as error:
            self._pass_over(segment.path, error)
            return None

    def _pass_over(self, path: Path, error: LensError) -> None:
        if path not in self.damaged:
            self.damaged.append(path)
            logger.warning("%s", error)

    def _folder_of(self, table: str) -> Path:
        known = self.tables()
        if table not in known:
            raise LensError(f"{self.folder} has no table '{table}'{meant(table, known)}")
        return self.folder / table

    def pandas(self, name: str) -> Any:
        """A table as a pandas DataFrame; raises as `table` does."""
        return self.table(name).to_pandas()

    def polars(self, name: str) -> Any:
        """A table as a Polars DataFrame; raises as `table` does, and ConfigurationError where Polars is missing."""
        return polars_frame(self.table(name))

    def series(self, table: str, measure: str) -> Series:
        """A scalar measure over time (see `series_of`).

        Raises:
            LensError: there is no such table, or no such measure of scalars in it.
        """
        return series_of(self.table(table, [measure]), measure)

    def vectors(self, table: str, measure: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A measure of vectors over time: steps, and by module (steps, its longest), padded (see `vectors_of`).

        Raises:
            LensError: there is no such table, or no such measure of vectors in it.
        """
        return vectors_of(self.table(table, [measure]), measure)

    def snapshot_steps(self, table: str) -> list[int]:
        """The steps of the whole snapshots of a table, ascending; none where there is no such table.

        Damaged ones are left out.
        """
        return [step for step, path in snapshots_in(self.folder / table).items() if self._is_whole(path)]

    def _is_whole(self, path: Path) -> bool:
        try:
            require_whole(path)
        except LensError as error:
            self._pass_over(path, error)
            return False
        return True

    def snapshot(self, table: str, step: int) -> dict[str, Tensor]:
        """The tensors of a snapshot by name, on the CPU.

        Raises:
            LensError: there is none of that step, or it is damaged.
        """
        steps = snapshots_in(self._folder_of(table))
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise LensError(f"{self.folder / table} has no snapshot of step {step}; there are: {there}.")
        return read_snapshot(steps[step])

    def cost(self) -> dict[str, float]:
        """Seconds that each collector took; empty before the first flush that gave them.

        Raises:
            LensError: cost.json is damaged.
        """
        return read_cost(self.folder)


def read_cost(folder: Path) -> dict[str, float]:
    """See `LensStore.cost`."""
    path = folder / COST
    try:
        return {name: float(seconds) for name, seconds in read_json(path).items()} if path.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LensError(f"{path} is damaged ({error}): delete it; no other file needs it.") from error


def _table_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and TABLE_NAME.fullmatch(path.name))


@contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, pa.ArrowException) as error:
        raise LensError(
            f"captures cannot be written in {folder}: {error}. Make room there, give a folder that may be written "
            "(output.base_output_dir), or train without captures (lens.enabled=false)."
        ) from error
