"""How far the model has moved from its base on the probe set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training_lens.analyzers.module_groups import (
    find_extremes,
    group_series,
    json_numbers,
    latest_values,
    spread_indices,
)
from training_lens.core import table_names as tables
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import RUN, DataType, Series

MAX_POINTS = 200  # of a curve


@AnalyzerRegistry.register
class ActivationAnalyzer(DataAnalyzer):
    """Drift of the hidden states, their similarity to the base's, and the KL divergence of the predictions.

    Gives `step`, the last probe's; `drift` and `cka`, by layer at that step; `probe`, the sizes of the probe set (CKA
    takes at most 256 of its tokens); `kl`, steps and nats over time; `share_by_kind` and `share_by_layer`, the norm of
    the adapter's output over that of the frozen weight's (medians over modules), and `share`, the least and the most.
    What was not captured is empty or None.
    """

    name = "activations"
    needs = frozenset[DataType]()
    gives = ("step", "drift", "cka", "probe", "kl", "share", "share_by_kind", "share_by_layer")

    def can_read(self, recording: Recording) -> bool:
        """Whether the recording has any of the probe's tables."""
        return any(recording.has(name) for name in (tables.ACTIVATIONS, tables.DIVERGENCE, tables.LORA_ACTIVATIONS))

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        drift = recording.series(tables.ACTIVATIONS, "drift")
        share = recording.series(tables.LORA_ACTIVATIONS, "share")
        return {
            "step": int(drift.steps[-1]) if len(drift.steps) else None,
            "drift": latest_values(drift),
            "cka": latest_values(recording.series(tables.ACTIVATIONS, "cka")),
            "probe": dict(recording.manifest.probe) if recording.manifest.probe else None,
            "kl": run_curve(recording.series(tables.DIVERGENCE, "kl")),
            "share": find_extremes(latest_values(share)),
            "share_by_kind": latest_values(group_series(share, recording.modules, "kind", norms=False)),
            "share_by_layer": latest_values(group_series(share, recording.modules, "layer", norms=False)),
        }


def run_curve(series: Series) -> dict[str, list[Any]]:
    """The values of the row `run` over time: steps and values, at most `MAX_POINTS` of them."""
    if RUN not in series.names:
        return {"steps": [], "values": []}
    kept = spread_indices(len(series.steps), MAX_POINTS)
    return {"steps": series.steps[kept].tolist(), "values": json_numbers(series.column(RUN)[kept])}
