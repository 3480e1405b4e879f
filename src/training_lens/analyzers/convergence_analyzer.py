"""The trend of the loss, what is left to gain, and how far the model has moved from its base on the probe set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.module_groups import (
    find_extremes,
    finite_points,
    group_series,
    json_number,
    json_numbers,
    latest_values,
    nan_median,
    spread_indices,
)
from training_lens.core import table_names as tables
from training_lens.core.collector import AnalyzerRegistry
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.types import RUN, DataType, Series
from training_lens.measures.curves import FitEstimate, log_slope, remaining_gain

MAX_POINTS = 200  # of a curve
WINDOWS = 50  # smoothing windows in a run
MIN_VALIDATIONS = 4  # so that the later half has a slope
STEADY_RATE = 0.9  # of the peak: under a rate that falls further, every curve flattens and cannot be extended


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


@AnalyzerRegistry.register
class ConvergenceAnalyzer(DataAnalyzer):
    """The smoothed training loss, its slope against ln(steps), the remaining gain, and the best validation.

    Gives `training`, steps and smoothed losses (medians of a moving window, a fiftieth of the run); `slope`, the change
    of the loss for each e-fold of steps over the later half of the run; `remaining_gain`, how much the loss would fall
    until `until_step` at that slope, null unless the learning rate is known to stay near its peak in that half; both
    with standard errors. `of` names their loss: validation with four or more
    validations, else training. `until_step` is the planned end, or twice the last step for a run that has reached it.
    Also `best_validation` and `last_validation` with their steps, and `base_loss`. Losses are nats per supervised
    token.
    """

    name = "convergence"
    needs = frozenset({DataType.LOSS})
    gives = tuple("training of slope remaining_gain until_step best_validation last_validation base_loss".split())

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        training = recording.series(tables.LOSS, "loss")
        steps, losses = finite_points(recording, tables.EVALUATION, "loss")
        base = finite_points(recording, tables.EVALUATION, "base_loss")[1]
        validations = [{"step": int(step), "loss": float(loss)} for step, loss in zip(steps, losses, strict=True)]
        by_validation = len(validations) >= MIN_VALIDATIONS
        if not by_validation:
            steps, losses = training.steps, training.values.ravel()
        half = len(steps) // 2
        last, planned = int(steps[-1]) if len(steps) else 0, int(recording.settings.get("total_steps") or 0)
        until = planned if planned > last else 2 * last
        estimates = {"slope": log_slope(steps[half:], losses[half:]), "remaining_gain": FitEstimate(np.nan, np.nan)}
        if len(steps) and measure_late_rate(recording, int(steps[half])) >= STEADY_RATE:
            estimates["remaining_gain"] = remaining_gain(steps[half:], losses[half:], until)
        return {
            "training": run_curve(smooth_series(training)),
            "of": "validation" if by_validation else "training",
            **{name: {key: json_number(x) for key, x in each._asdict().items()} for name, each in estimates.items()},
            "until_step": until if len(steps) else None,
            "best_validation": min(validations, key=lambda point: point["loss"], default=None),
            "last_validation": validations[-1] if validations else None,
            "base_loss": float(base[0]) if len(base) else None,
        }


def measure_late_rate(recording: Recording, since: int) -> float:
    """The lowest learning rate after step `since` over the highest of the run; NaN if no rate was captured."""
    steps, rates = finite_points(recording, tables.LOSS, "lr")
    late = rates[steps >= since]
    return float(late.min() / rates.max()) if len(late) and rates.max() > 0 else np.nan


def smooth_series(series: Series, most: int = MAX_POINTS) -> Series:
    """Medians over a moving window of a fiftieth of the run, at `most` steps: 100,000 windows would take gigabytes."""
    kept = spread_indices(len(series.steps), most)
    width = max(1, len(series.steps) // WINDOWS) | 1  # odd, so that it is centred
    padded = np.pad(series.values, ((width // 2, width // 2), (0, 0)), constant_values=np.nan)
    values = np.zeros((len(kept), series.values.shape[1]))
    for column in range(series.values.shape[1]):
        windows = np.lib.stride_tricks.sliding_window_view(padded[:, column], width)  # (steps, width)
        values[:, column] = nan_median(windows[kept])
    return Series(series.steps[kept], series.names, values)
