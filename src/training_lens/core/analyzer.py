"""What an analyzer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from training_lens.core.recording import Recording
from training_lens.core.types import DataType


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
