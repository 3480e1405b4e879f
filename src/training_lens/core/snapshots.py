"""Whole tensors of some steps on disk: one safetensors file for each table and step, limited in total size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from training_lens.errors import DamagedFileError, LensError
from training_lens.utils.formatting import format_size
from training_lens.utils.integrity import safe_save, verify_seal
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import describe_shortage

logger = get_logger(__name__)
SNAPSHOT_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def snapshot_path(folder: Path, table: str, step: int) -> Path:
    return folder / table / f"step-{step:08d}.safetensors"


def list_snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots of one table by step, ascending, without opening them."""
    found = [(snapshot_step(path), path) for path in folder.glob("*.safetensors")]
    return dict(sorted((step, path) for step, path in found if step is not None))


def snapshot_step(path: Path) -> int | None:
    """The step in a snapshot's name; None if the name is not a snapshot's."""
    match = SNAPSHOT_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def require_intact(path: Path) -> None:
    """Check a snapshot against its sha256, and against its header, which gives the file's length.

    Raises:
        LensError: it is damaged; names it.
    """
    try:
        verify_seal(path)
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError, DamagedFileError) as error:
        if describe_shortage(error):
            raise
        raise LensError(f"{path} is damaged ({error}): this snapshot is lost") from error


def read_snapshot(path: Path) -> dict[str, Tensor]:
    """The tensors of a snapshot by name, on the CPU.

    Raises:
        LensError: it is damaged; names it.
    """
    require_intact(path)
    return load_file(path)


class SnapshotWriter:
    """Writes the snapshots of a folder: at most `limit_bytes` after each `flush` and `delete_dropped`.

    Args:
        after_step: snapshots of later steps are dropped.
    """

    def __init__(self, folder: Path, limit_bytes: int, after_step: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._pending: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._has_warned = False
        self._dropped: list[Path] = []
        self._sizes: dict[str, dict[int, int]] = {}  # table -> step -> bytes
        for table in (path for path in folder.iterdir() if path.is_dir()):
            found = list_snapshots(table)
            self._sizes[table.name] = {step: p.stat().st_size for step, p in found.items() if step <= after_step}
            for path in [p for step, p in found.items() if step > after_step]:
                path.unlink()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(sum(sizes.values()) for sizes in self._sizes.values())

    @property
    def snapshot_paths(self) -> list[Path]:
        """The files that are kept."""
        return [snapshot_path(self._folder, table, step) for table, sizes in self._sizes.items() for step in sizes]

    def last_steps(self) -> dict[str, int]:
        """The last step on disk of each table that has one."""
        return {table: max(sizes) for table, sizes in self._sizes.items() if sizes}

    @property
    def pending_bytes(self) -> int:
        return sum(t.nbytes for tensors in self._pending.values() for t in tensors.values())

    def add_snapshot(self, table: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors to the CPU for the next flush; waits for their device."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if not self._limit_bytes:
            return
        if size > self._limit_bytes:
            if not self._has_warned:
                logger.warning(
                    "%s: a snapshot takes %s, more than lens.snapshots_megabytes allows (%s): none is kept.",
                    *(table, format_size(size), format_size(self._limit_bytes)),
                )
            self._has_warned = True
            return
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending.setdefault((table, step), {}).update(copies)

    def flush(self) -> int:
        """Write what is pending, and drop old snapshots while the total is over the limit.

        `delete_dropped` deletes them. Returns the bytes written.
        """
        written = 0
        for table, step in list(self._pending):
            path = snapshot_path(self._folder, table, step)
            path.parent.mkdir(exist_ok=True)
            safe_save(self._pending[table, step], path)
            del self._pending[table, step]
            self._sizes.setdefault(table, {})[step] = path.stat().st_size
            written += self._sizes[table][step]
        while self.size > self._limit_bytes:
            self._drop_snapshots()
        return written

    def _drop_snapshots(self) -> None:
        """Drop from the largest table with several: every second one, the first and last excepted; of two, the first.

        If no table has more than one, drop the oldest.
        """
        several = {table: sizes for table, sizes in self._sizes.items() if len(sizes) > 1}
        if several:
            table = max(several, key=lambda name: sum(several[name].values()))
            dropped = sorted(several[table])[1:-1:2] or sorted(several[table])[:1]
        else:
            table = min((name for name, sizes in self._sizes.items() if sizes), key=lambda name: min(self._sizes[name]))
            dropped = list(self._sizes[table])
        for step in dropped:
            self._dropped.append(snapshot_path(self._folder, table, step))
            del self._sizes[table][step]

    def delete_dropped(self) -> None:
        """Delete the dropped files."""
        while self._dropped:
            self._dropped.pop().unlink(missing_ok=True)
