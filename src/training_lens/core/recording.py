"""A run's captures, as analyzers and reports read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from training_lens.core.types import LensManifest, ModuleRecord, Series


class Captures(Protocol):
    """Tables and snapshots, from a lens folder (`LensStore`) or computed from checkpoints."""

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

    `name` is for people to read; `status` is running, finished, interrupted, failed, or unknown.
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
        """Whether the table, and the measure if given, was captured."""
        return table in self.captures.tables() and (measure is None or measure in self.captures.measures(table))

    def series(self, table: str, measure: str) -> Series:
        """One measure over time; a series without steps if it was not captured."""
        if not self.has(table, measure):
            return Series.empty()
        return self.captures.series(table, measure)
