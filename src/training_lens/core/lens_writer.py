"""Writes a lens folder while training runs. A folder has one writer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
from safetensors import SafetensorError

from training_lens.config.lens_section import LensSection
from training_lens.core.arrow import CaptureBuffer, buffer_capture, build_table
from training_lens.core.capture_files import (
    LISTING,
    describe_loss,
    read_manifest,
    truncate_listing,
    write_listing,
    write_manifest,
)
from training_lens.core.lens_store import COST, TABLE_NAME, read_cost, table_folders
from training_lens.core.segments import SegmentedTable, enforce_size_limit
from training_lens.core.snapshots import SnapshotWriter
from training_lens.core.table_names import STATES
from training_lens.core.types import Captured, LensManifest
from training_lens.errors import LensError
from training_lens.utils.files import sweep_temporaries
from training_lens.utils.integrity import write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
MEGABYTE = 1_000_000
MAX_PENDING_BYTES = 8 * MEGABYTE


class LensWriter:
    """Writes the captures of one run. It must be the only writer of its folder.

    Args:
        folder: created if missing.
        manifest: written as lens.json.
        section: how much space captures may take, and how often they are flushed.
        after_step: the last step before a resume: captures of later steps are dropped. 0: all are dropped.

    Raises:
        LensError: the folder cannot be written.
    """

    def __init__(self, folder: Path | str, manifest: LensManifest, section: LensSection, after_step: int = 0) -> None:
        folder = Path(folder)
        self._folder = folder
        self._limit_bytes = section.scalars_megabytes * MEGABYTE
        self._flush_seconds = section.flush_seconds
        self._pending: dict[str, list[CaptureBuffer]] = {}
        self._pending_bytes = 0
        self._bytes_written = 0
        self._flushed_at = time.monotonic()
        self._kept_steps = after_step or -1  # a new run drops step 0 too
        with _raise_lens_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(folder, older_than_seconds=0)
            if not after_step:
                (folder / COST).unlink(missing_ok=True)
            self._missing = _start_listing(folder, after_step)
            self._tables = {path.name: SegmentedTable(path, self._kept_steps) for path in table_folders(folder)}
            self._snapshots = SnapshotWriter(folder, section.snapshots_megabytes * MEGABYTE, self._kept_steps)
            if after_step:
                _warn_of_another_probe(folder, manifest)
            write_manifest(folder, manifest)

    def cost(self) -> dict[str, float]:
        """Seconds by collector that the run took before it was resumed."""
        return read_cost(self._folder)

    def last_steps(self) -> dict[str, int]:
        """The last step on disk of each table that has one; unknown for damaged segments."""
        steps = {name: step for name, table in self._tables.items() if (step := table.last_step()) is not None}
        snapshots = self._snapshots.last_steps()
        return {name: max(steps.get(name, 0), snapshots.get(name, 0)) for name in steps.keys() | snapshots.keys()}

    @property
    def bytes_written(self) -> int:
        """All bytes of segments and snapshots that this writer wrote, merges included."""
        return self._bytes_written

    @property
    def size(self) -> int:
        """Bytes of segments and snapshots on disk."""
        return sum(table.size for table in self._tables.values()) + self._snapshots.size

    def add(self, table: str, step: int, captured: Captured) -> None:
        """Copy a capture for the next flush.

        Scalars and vectors stay on their device, without waiting for it. Snapshot tensors are copied to the CPU, which
        waits.

        Raises:
            LensError: values that do not fit their rows, or a table name that cannot be a folder's.
        """
        if not TABLE_NAME.fullmatch(table) or table == STATES:
            raise LensError(
                f"'{table}' cannot name a table: use letters, digits, '_', '-' and '.', as for a folder, and not "
                f"'{STATES}', where the run's states are."
            )
        try:
            packed = buffer_capture(step, captured)
        except LensError as error:
            raise LensError(f"{table}: {error}") from error
        self._pending.setdefault(table, []).append(packed)
        self._pending_bytes += packed.nbytes
        if captured.tensors:
            self._snapshots.add_snapshot(table, step, captured.tensors)

    def pending_tables(self) -> dict[str, Callable[[], pa.Table]]:
        """For each table what builds the rows that the next flush will write. Each waits for the device when called."""
        return {name: partial(build_table, tuple(pending)) for name, pending in self._pending.items() if pending}

    def flush_if_due(self, cost: Mapping[str, float] | None = None) -> None:
        """Flush if `lens.flush_seconds` have passed since the last flush, or much is pending; raises as `flush`."""
        pending = self._pending_bytes + self._snapshots.pending_bytes
        most = min(MAX_PENDING_BYTES, self._limit_bytes / 8)  # an eighth, as the newest segment is not thinned
        if pending > most or time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush(cost)

    def flush(self, cost: Mapping[str, float] | None = None) -> None:
        """Write what is pending, then merge and thin to the size limits. Waits for the device once a table.

        Args:
            cost: seconds by collector so far, written as cost.json.

        Raises:
            LensError: writing failed, for example because the disk is full. Files on disk stay readable, and the rest
                stays pending.
        """
        self._flushed_at = time.monotonic()
        with _raise_lens_error(self._folder):
            for table in self._pending:
                self._flush_table(table)
            self._bytes_written += self._snapshots.flush()
            if cost is not None:
                write_sealed(self._folder / COST, cost)
            self._bytes_written += enforce_size_limit(self._tables.values(), self._limit_bytes)
            segments = [segment.path for table in self._tables.values() for segment in table.segments]
            write_listing(self._folder, {*segments, *self._snapshots.snapshot_paths, *self._missing})
            self._snapshots.delete_dropped()

    def _flush_table(self, table: str) -> None:
        pending = self._pending[table]
        rows = build_table(pending)
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


def _start_listing(folder: Path, after_step: int) -> list[Path]:
    """List only captures up to `after_step`, before later ones are deleted; return the missing ones among them."""
    if not after_step:
        (folder / LISTING).unlink(missing_ok=True)
        return []
    try:
        missing = truncate_listing(folder, after_step)
    except LensError as error:
        logger.warning("%s", error)
        return []
    for path in missing:
        logger.warning("%s", describe_loss(path))
    return missing


def _warn_of_another_probe(folder: Path, manifest: LensManifest) -> None:
    """Warn where a resumed run has another probe set than before."""
    with suppress(LensError):  # no lens.json yet, or a damaged one
        before = read_manifest(folder).probe
        if before and manifest.probe and before != manifest.probe:
            logger.warning(
                "the lens's probe set has %d examples of %d tokens now, and had %d of %d before: what is measured on "
                "it before and after this step cannot be compared",
                *(probe[key] for probe in (manifest.probe, before) for key in ("examples", "tokens")),
            )  # fmt: skip


@contextmanager
def _raise_lens_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, pa.ArrowException) as error:
        raise LensError(
            f"captures cannot be written in {folder}: {error}. Free space there, set a writable folder "
            "(output.base_output_dir), or train without captures (lens.enabled=false)."
        ) from error
