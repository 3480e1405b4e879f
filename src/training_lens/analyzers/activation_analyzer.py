"""How far the model computes otherwise than its base, on the probe set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training_lens.analyzers.module_groups import extremes, grouped, latest, numbers, thinned
from training_lens.core import table_names as tables
from training_lens.core.analyzer import DataAnalyzer
from training_lens.core.recording import Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import RUN, DataType, Series

POINTS = 200  # of a curve


@AnalyzerRegistry.register
class ActivationAnalyzer(DataAnalyzer):
    """Drift of the hidden states, their similarity to the base's, and the divergence of what is predicted.

    Gives `step`, that of the last probe; `drift` and `cka`, by layer at that step; `probe`, the sizes of the probe set
    that these are from (CKA from at most 256 of its tokens); `kl`, steps and nats over time; `share_by_kind` and
    `share_by_layer`, the adapter's output over that of the frozen weight (medians over modules), and `share`, the least
    and the most. What was not captured is empty or None.
    """

    name = "activations"
    needs = frozenset[DataType]()
    gives = ("step", "drift", "cka", "probe", "kl", "share", "share_by_kind", "share_by_layer")

    def can_read(self, recording: Recording) -> bool:
        """Whether any of the probe's tables is there."""
        return any(recording.has(name) for name in (tables.ACTIVATIONS, tables.DIVERGENCE, tables.LORA_ACTIVATIONS))

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        drift = recording.series(tables.ACTIVATIONS, "drift")
        share = recording.series(tables.LORA_ACTIVATIONS, "share")
        return {
            "step": int(drift.steps[-1]) if len(drift.steps) else None,
            "drift": latest(drift),
            "cka": latest(recording.series(tables.ACTIVATIONS, "cka")),
            "probe": dict(recording.manifest.probe) if recording.manifest.probe else None,
            "kl": curve(recording.series(tables.DIVERGENCE, "kl")),
            "share": extremes(latest(share)),
            "share_by_kind": latest(grouped(share, recording.modules, "kind", norms=False)),
            "share_by_layer": latest(grouped(share, recording.modules, "layer", norms=False)),
        }


def curve(series: Series) -> dict[str, list[Any]]:
    """The run's own values over time: steps and values, at most `POINTS` of them."""
    if RUN not in series.names:
        return {"steps": [], "values": []}
    short = thinned(series, POINTS)
    return {"steps": short.steps.tolist(), "values": numbers(short.of(RUN))}
