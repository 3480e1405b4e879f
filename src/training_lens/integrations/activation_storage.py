"""Tensors by step in any storage, in the format of the lens's snapshots."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.snapshots import SNAPSHOT_NAME, read_snapshot, snapshot_path
from training_lens.integrations.storage import StorageBackend
from training_lens.utils.integrity import safe_save


class ActivationStorage:
    """Activations of some steps, a safetensors file each: those of your own hooks, or the snapshots of a run.

    Args:
        storage: of a run, the one at its lens folder.
        table: which tensors: `activations`, `adapters` (the trained weights), or a name of your own.

    Example:
        lens = open_storage("s3://bucket/path/experiments/default/runs/20261120T203605Z-5f3a/lens")
        captured = ActivationStorage(lens)
        tensors = captured.load(captured.steps()[-1])
    """

    def __init__(self, storage: StorageBackend, table: str = tables.ACTIVATIONS) -> None:
        self.storage, self.table = storage, table

    def steps(self) -> tuple[int, ...]:
        """The stored steps, ascending."""
        names = [name.rpartition("/")[2] for name in self.storage.list(self.table)]
        return tuple(sorted(int(match[1]) for match in map(SNAPSHOT_NAME.fullmatch, names) if match))

    def load(self, step: int) -> dict[str, Tensor]:
        """The tensors of a step by name, on the CPU."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "tensors.safetensors"
            self.storage.get_file(self._name(step), local)
            return read_snapshot(local)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a step, on any device, replacing those of an earlier call."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "tensors.safetensors"
            safe_save(tensors, local)
            self.storage.put_file(local, self._name(step))

    def _name(self, step: int) -> str:
        return snapshot_path(Path(), self.table, step).as_posix()
