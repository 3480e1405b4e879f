"""The adapter's update: its size, its rank, and the layers that carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.module_groups import (
    energy_shares,
    find_extremes,
    json_numbers,
    latest_values,
    nan_median,
    step_ratio,
    update_strength,
)
from training_lens.core import table_names as tables
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import DataType, Series

RANKS = ("effective_rank", "stable_rank", "energy_rank", "top_ratio")


@AnalyzerRegistry.register
class LoRAAnalyzer(DataAnalyzer):
    """Size, ranks and balance of the update at the last captured step, and which layers carry it.

    Gives `step`, the last one; `modules`, a row for each with layer, kind, rank and its measures (None where missing);
    `strength` (||dW|| / ||W||), `step_ratio` (each module's median over the run of ||change of dW|| / ||W||) and
    `balance` (||A A^T - B^T B||) as median, least and most; `ranks`, medians over modules; `share_by_layer` and
    `share_by_kind` of the sum of ||dW||^2; `not_finite`, the modules whose weights were NaN or infinite at some step,
    with the first such step.
    """

    name = "weights"
    needs = frozenset({DataType.ADAPTER_WEIGHTS})
    gives = (
        *("step", "modules", "strength", "step_ratio", "balance", "ranks", "share_by_layer", "share_by_kind"),
        "not_finite",
    )

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        norms, balance = recording.series(tables.WEIGHTS, "norm_update"), recording.series(tables.WEIGHTS, "balance")
        columns: dict[str, dict[str, float | None]] = {
            "norm_update": latest_values(norms),
            "strength": latest_values(update_strength(recording)),
            "step_ratio": _median_over_steps(step_ratio(recording)),
            "balance": latest_values(balance),
            **{rank: latest_values(recording.series(tables.SPECTRA, rank)) for rank in RANKS},
        }
        return {
            "step": int(norms.steps[-1]) if len(norms.steps) else None,
            "modules": [
                {"module": m.name, "layer": m.layer, "kind": m.kind, "rank": m.rank}
                | {column: values.get(m.name) for column, values in columns.items()}
                for m in recording.modules
            ],
            **{what: find_extremes(columns[what]) for what in ("strength", "step_ratio", "balance")},
            "ranks": {rank: find_extremes(columns[rank])["median"] for rank in RANKS},
            "share_by_layer": latest_values(energy_shares(norms, recording.modules, "layer")),
            "share_by_kind": latest_values(energy_shares(norms, recording.modules, "kind")),
            "not_finite": find_nonfinite(norms),
        }


def _median_over_steps(series: Series) -> dict[str, float | None]:
    """Each name's median over the steps."""
    return dict(zip(series.names, json_numbers(nan_median(series.values.T)), strict=True))


def find_nonfinite(series: Series) -> list[dict[str, Any]]:
    """Modules whose value was NaN or infinite at some step, and the first such step; ordered by it.

    For measures that every captured step has, as a missing value is NaN too.
    """
    broken = ~np.isfinite(series.values)
    found = [
        (int(series.steps[broken[:, j].argmax()]), name) for j, name in enumerate(series.names) if broken[:, j].any()
    ]
    return [{"module": name, "step": step} for step, name in sorted(found, key=lambda pair: pair[0])]
