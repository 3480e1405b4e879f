"""What an analyzer is: a reading of a recording."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from training_lens.core.recording import Recording
from training_lens.core.types import DataType


class DataAnalyzer(ABC):
    """Reads a recording and gives plain values, which every report shows and `analyze --json` prints.

    `needs` are the kinds of data without which it says nothing; `gives` names what it returns.

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
        """Whether the recording has a table of every kind that it needs."""
        kinds = {recording.manifest.tables.get(name) for name in recording.captures.tables()}
        return self.needs <= kinds

    @abstractmethod
    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        """Numbers, texts, lists and mappings of them, by the names in `gives`."""
