"""The whole analysis of a run in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training_lens.analysis.findings.diagnosis import diagnose
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.open_recording import open_recording
from training_lens.analyzers.module_groups import By, json_number, json_value, read_evolution
from training_lens.analyzers.saved_factors import snapshot_factors
from training_lens.analyzers.similarity_analyzer import (
    SimilarityAnalyzer,
    UpdateSimilarity,
    compare_updates,
    decompose_updates,
)
from training_lens.core import table_names as tables
from training_lens.core.collector import AnalyzerRegistry
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.errors import LensError
from training_lens.measures.factors import Factors
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Analysis:
    """The results of all analyzers and findings for one recording.

    `results` are plain values by analyzer name; analyzers without captured data are missing.
    """

    recording: Recording
    results: Mapping[str, Mapping[str, Any]]
    findings: tuple[Finding, ...]

    def values(self) -> dict[str, Any]:
        """Plain values for JSON: numbers are finite or None."""
        return {
            "run": self.recording.name,
            "folder": str(self.recording.folder),
            "status": self.recording.status,
            "results": json_value(self.results),
            "findings": [json_value(asdict(finding)) for finding in self.findings],
        }


@dataclass(frozen=True)
class AdapterComparison:
    """The similarity of the last adapters of two runs, by module.

    `steps` are the compared steps; `only_first` and `only_second` are modules that only one run adapts.
    """

    names: tuple[str, str]
    steps: tuple[int, int]
    modules: Mapping[str, UpdateSimilarity]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Plain values for JSON, with the median cosine over modules."""
        cosines = [one.cosine for one in self.modules.values() if np.isfinite(one.cosine)]
        return {
            "runs": list(self.names),
            "steps": list(self.steps),
            "median_cosine": json_number(np.median(cosines)) if cosines else None,
            "modules": json_value({name: vars(one) for name, one in self.modules.items()}),
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
        }


class CheckpointAnalyzer:
    """Reads and analyzes a run, or its checkpoints.

    Args:
        path: see `open_recording`.
        base: for adapters without captures, the base model folder; None: the one in their configuration.

    Raises:
        LensError: there is nothing to read.
        AdapterError: an adapter is broken or not a LoRA.

    Example:
        analyzer = CheckpointAnalyzer("outputs/experiments/default/runs/20261120T203605Z-5f3a")
        analysis = analyzer.analyze()
        analysis.results["weights"]["share_by_layer"]
        analyzer.evolution("strength", by="layer").values  # (steps, layers)
        analyzer.compare("another/run").values()["median_cosine"]
    """

    def __init__(self, path: Path | str, base: Path | str | None = None) -> None:
        self.recording = open_recording(path, base)

    def analyze(self) -> Analysis:
        """The results of all registered analyzers and findings.

        A user's own analyzer that fails is left out with a warning.
        """
        results: dict[str, Mapping[str, Any]] = {}
        for name in AnalyzerRegistry.names():
            analyzer = AnalyzerRegistry.get(name)()
            if not analyzer.can_read(self.recording):
                continue
            try:
                results[name] = analyzer.analyze(self.recording)
            except Exception as error:
                if type(analyzer).__module__.startswith("training_lens."):
                    raise
                logger.warning("the analyzer '%s' failed and is left out: %s", name, describe_error(error))
        return Analysis(self.recording, results, diagnose(self.recording))

    def evolution(self, measure: str, by: By = "module") -> Series:
        """See `analyzers.module_groups.read_evolution`."""
        return read_evolution(self.recording, measure, by)

    def adapter(self, step: int | None = None) -> dict[str, Factors]:
        """A (rank, in) and B (out, rank) of each module at a snapshot, or the last one: see `snapshot_factors`."""
        return snapshot_factors(self.recording, _last_snapshot_step(self.recording) if step is None else step)

    def similarity(self) -> Mapping[str, Any]:
        """The similarity of each snapshot to the last one, see `SimilarityAnalyzer`; a `LensError` without two."""
        steps = self.recording.captures.snapshot_steps(tables.SNAPSHOTS)
        if len(steps) < 2:
            raise LensError(
                f"{self.recording.name} has {len(steps)} snapshots of its adapter, but similarity needs two. Capture "
                "more (lens.snapshot_every), or keep more checkpoints."
            )
        return SimilarityAnalyzer().analyze(self.recording)

    def compare(self, other: CheckpointAnalyzer | Path | str) -> AdapterComparison:
        """The similarity of the last snapshots of two runs with the same base; their ranks may differ.

        Raises:
            LensError: module shapes differ, the runs have no module in common, or one has no snapshot.
        """
        there = other if isinstance(other, CheckpointAnalyzer) else CheckpointAnalyzer(other)
        return compare_adapters(self.recording, there.recording)


def compare_adapters(first: Recording, second: Recording) -> AdapterComparison:
    """The similarity of the last snapshots of two recordings; raises like `CheckpointAnalyzer.compare`."""
    steps = (_last_snapshot_step(first), _last_snapshot_step(second))
    here, there = snapshot_factors(first, steps[0]), snapshot_factors(second, steps[1])
    alike = compare_updates(decompose_updates(first.modules, here), decompose_updates(second.modules, there))
    if not alike:
        raise LensError(
            f"{first.name} and {second.name} adapt no module in common: one has {next(iter(here), 'none')}, the other "
            f"{next(iter(there), 'none')}. Give two runs with the same base model."
        )
    names = (first.name, second.name)
    in_order = {module.name: alike[module.name] for module in first.modules if module.name in alike}
    return AdapterComparison(names, steps, in_order, tuple(here.keys() - alike), tuple(there.keys() - alike))


def _last_snapshot_step(recording: Recording) -> int:
    steps = recording.captures.snapshot_steps(tables.SNAPSHOTS)
    if not steps:
        raise LensError(
            f"{recording.name} has no snapshot of its adapter: none was kept (lens.snapshots_megabytes=0?), or it has "
            "only started."
        )
    return steps[-1]
