"""A run as far as it was captured: what analyzers and reports read, wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from training_lens.core.types import LensManifest, ModuleRecord, Series


class Captures(Protocol):
    """Tables and snapshots: those of a lens folder (`LensStore`), or made from checkpoints."""

    def tables(self) -> tuple[str, ...]: ...

    def table(self, name: str, columns: Sequence[str] | None = None) -> Any: ...  # pyarrow.Table

    def measures(self, name: str) -> tuple[str, ...]: ...

    def series(self, table: str, measure: str) -> Series: ...

    def vectors(self, table: str, measure: str) -> tuple[np.ndarray, dict[str, np.ndarray]]: ...

    def snapshot_steps(self, table: str) -> list[int]: ...

    def snapshot(self, table: str, step: int) -> dict[str, Tensor]: ...

    def cost(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Recording:
    """One run's captures.

    `name` is what a person calls it; `status` running, finished, interrupted, failed, or unknown.
    """

    name: str
    folder: Path
    manifest: LensManifest
    captures: Captures
    status: str = "unknown"

    @property
    def modules(self) -> tuple[ModuleRecord, ...]:
        return self.manifest.modules

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.manifest.settings

    def has(self, table: str, measure: str | None = None) -> bool:
        """Whether anything was captured of it."""
        return table in self.captures.tables() and (measure is None or measure in self.captures.measures(table))

    def series(self, table: str, measure: str) -> Series:
        """One measure over time; without steps where nothing was captured of it."""
        if not self.has(table, measure):
            return Series.empty()
        return self.captures.series(table, measure)
