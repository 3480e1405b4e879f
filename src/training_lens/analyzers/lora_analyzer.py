"""The adapter: its update's size and rank, the layers that carry it, and its gradients with their certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.module_groups import (
    energy_shares,
    find_extremes,
    gradient_norms,
    group_series,
    json_number,
    json_numbers,
    latest_values,
    nan_median,
    step_ratio,
    update_strength,
)
from training_lens.core import table_names as tables
from training_lens.core.collector import AnalyzerRegistry
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.types import DataType, Series

END_SHARE = 0.1  # of the run: its end
# relative rounding is at most 1e-7 in float32 and 0.2 % in bfloat16: a few roundings stay below this
SOUND = 0.01
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
    gives = tuple("step modules strength step_ratio balance ranks share_by_layer share_by_kind not_finite".split())

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        norms, ratios = recording.series(tables.WEIGHTS, "norm_update"), step_ratio(recording)
        columns: dict[str, dict[str, float | None]] = {
            "norm_update": latest_values(norms),
            "strength": latest_values(update_strength(recording)),
            "step_ratio": dict(zip(ratios.names, json_numbers(nan_median(ratios.values.T)), strict=True)),
            "balance": latest_values(recording.series(tables.WEIGHTS, "balance")),
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


@AnalyzerRegistry.register
class GradientAnalyzer(DataAnalyzer):
    """Norms by layer, consistency of direction, and the certificate of the capture.

    Gives `steps`, how many were captured; `norm_by_layer` and `norm_by_kind`, the median over steps of the norm of
    (dL/dA, dL/dB) of all modules there; `directions`, medians of the cosines over modules and steps, in the whole run
    and in its last tenth; `certificate`, the largest residual of B^T dB = dA A^T (`measures.directions.self_check`)
    with its module and step, and the number of values checked; `not_finite`, the modules whose gradient was NaN or
    infinite, with the first such step.
    """

    name = "gradients"
    needs = frozenset({DataType.ADAPTER_GRADIENTS})
    gives = ("steps", "norm_by_layer", "norm_by_kind", "directions", "certificate", "not_finite")

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        norms = gradient_norms(recording)
        directions = {name: recording.series(tables.GRADIENTS, name) for name in ("cosine_previous", "cosine_mean")}
        return {
            "steps": len(norms.steps),
            "norm_by_layer": _median_by_group(norms, recording, "layer"),
            "norm_by_kind": _median_by_group(norms, recording, "kind"),
            "directions": {name: _median_cosines(series) for name, series in directions.items()},
            "certificate": certify_capture(read_residuals(recording)),
            "not_finite": find_nonfinite(norms),
        }


def _median_by_group(norms: Series, recording: Recording, by: Any) -> dict[str, float | None]:
    together = group_series(norms, recording.modules, by, norms=True)
    return dict(zip(together.names, json_numbers(nan_median(together.values.T)), strict=True))


def _median_cosines(series: Series) -> dict[str, float | None]:
    late = series.values[-max(1, int(END_SHARE * len(series.values))) :]
    parts = {"run": series.values, "end": late}
    return {name: json_number(nan_median(values.reshape(1, -1))[0]) for name, values in parts.items()}


def find_half_frozen(recording: Recording) -> dict[str, str]:
    """The modules of which one factor alone gets gradients, each with the other one: "A" or "B"."""
    a, b = (recording.series(tables.GRADIENTS, f"norm_{of}") for of in "ab")
    later = b.steps > 1  # B is 0 before the first update, and A's gradient with it
    if a.names != b.names or not np.array_equal(a.steps, b.steps) or not later.any():
        return {}
    reaches = {name: (np.nan_to_num(series.values[later]) != 0).any(0) for name, series in (("A", a), ("B", b))}
    only = {"A": reaches["B"] & ~reaches["A"], "B": reaches["A"] & ~reaches["B"]}
    return {
        module: still for still, found in only.items() for module, is_so in zip(a.names, found, strict=True) if is_so
    }


def read_residuals(recording: Recording) -> Series:
    """The self-check of each module over the steps, NaN where one factor is frozen: the equation needs both."""
    series, frozen = recording.series(tables.GRADIENTS, "self_check"), find_half_frozen(recording)
    left_out = np.array([name in frozen for name in series.names], dtype=bool)
    return Series(series.steps, series.names, np.where(left_out, np.nan, series.values))


def certify_capture(residuals: Series) -> dict[str, Any]:
    """The largest residual with its module and step, and the number checked; None where nothing was checked."""
    known = ~np.isnan(residuals.values)
    if not known.any():
        return {"largest": None, "module": None, "step": None, "checked": 0}
    row, column = np.unravel_index(np.nanargmax(residuals.values), residuals.values.shape)
    return {
        "largest": json_number(residuals.values[row, column]),
        "module": residuals.names[column],
        "step": int(residuals.steps[row]),
        "checked": int(known.sum()),
    }


def find_nonfinite(series: Series) -> list[dict[str, Any]]:
    """Modules whose value was NaN or infinite at some step, and the first such step; ordered by it.

    For measures that every captured step has, as a missing value is NaN too.
    """
    broken = ~np.isfinite(series.values)
    found = [
        (int(series.steps[broken[:, j].argmax()]), name) for j, name in enumerate(series.names) if broken[:, j].any()
    ]
    return [{"module": name, "step": step} for step, name in sorted(found, key=lambda pair: pair[0])]
