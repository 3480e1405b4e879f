"""Reads a lens folder: at any time, also while training runs or after a kill. `LensWriter` fills it.

A folder holds lens.json (what its tables are about), files.json (the list of its files), cost.json (seconds by
collector), and a folder for each table with Parquet segments and snapshots. `lens.scalars_megabytes` and
`lens.snapshots_megabytes` limit its size; tables with one row per step, such as the loss, are never thinned. A number
takes 2.9 to 3.7 bytes: 12 measures take 35 to 45 bytes for each module and step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from training_lens.core.arrow import MODULE, STEP, concat_tables, polars_frame, require_measure, suggest_name
from training_lens.core.capture_files import LISTING, describe_loss, find_missing_captures
from training_lens.core.lens_manifest import read_manifest
from training_lens.core.recording import Captures
from training_lens.core.segments import TableSegment, list_segments, read_schema, read_segment
from training_lens.core.snapshots import list_snapshots, read_snapshot, require_intact
from training_lens.core.table_names import STATES
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
            for column in columns or ():
                if column not in header.column_names:
                    require_measure(header, column)
            rows = [self.read_or_skip(segment, lambda s: read_segment(s, columns)) for segment in segments]
        except FileNotFoundError:  # merged into another segment after it was listed
            return self.table(name, columns)
        wanted = [c for c in header.column_names if columns is None or c in (STEP, MODULE, *columns)]
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
