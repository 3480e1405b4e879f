"""A run's captures, as analyzers and reports read them; and what an analyzer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from training_lens.core.arrow import extract_series, extract_vectors
from training_lens.core.types import DataType, LensManifest, ModuleRecord, Series


class Captures(ABC):
    """Tables and snapshots, from a lens folder (`LensStore`) or computed from checkpoints.

    Each method raises a `LensError` for a table, measure or snapshot that is not there.
    """

    @abstractmethod
    def tables(self) -> tuple[str, ...]: ...

    @abstractmethod
    def table(self, name: str, columns: Sequence[str] | None = None) -> Any: ...  # pyarrow.Table

    @abstractmethod
    def measures(self, name: str) -> tuple[str, ...]: ...

    def series(self, table: str, measure: str) -> Series:
        """A scalar measure over time (see `extract_series`)."""
        return extract_series(self.table(table, [measure]), measure)

    def finite_points(self, table: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which a measure of the whole run is finite, and its values there, (points,) each."""
        series = self.series(table, measure)
        values = series.values.ravel()
        kept = np.isfinite(values)
        return series.steps[kept], values[kept]

    def vectors(self, table: str, measure: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A vector measure over time: steps, and by module (steps, its longest), padded (see `extract_vectors`)."""
        return extract_vectors(self.table(table, [measure]), measure)

    @abstractmethod
    def snapshot_steps(self, table: str) -> list[int]: ...

    @abstractmethod
    def snapshot(self, table: str, step: int) -> dict[str, Tensor]: ...

    @abstractmethod
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


class DataAnalyzer(ABC):
    """Reads a recording and returns plain values, for the reports and for `analyze --json`.

    `needs` are the data types that it cannot do without; `gives` are the names that it returns.

    Example:
        @AnalyzerRegistry.register
        class LoudestModule(DataAnalyzer):
            name, needs, gives = "loudest", frozenset({DataType.ADAPTER_GRADIENTS}), ("module",)

            def analyze(self, recording: Recording) -> Mapping[str, Any]:
                norms = recording.series("adapter_gradients", "norm_b")
                return {"module": norms.names[norms.values[-1].argmax()]}
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[DataType]]
    gives: ClassVar[tuple[str, ...]]

    def can_read(self, recording: Recording) -> bool:
        """Whether the recording has a table of every data type in `needs`."""
        types = {recording.manifest.tables.get(name) for name in recording.captures.tables()}
        return self.needs <= types

    @abstractmethod
    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        """Numbers, texts, and lists and mappings of them, by the names in `gives`."""
