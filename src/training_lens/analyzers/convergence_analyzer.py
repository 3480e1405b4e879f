"""The trend of the loss, and what is left to gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.activation_analyzer import MAX_POINTS, run_curve
from training_lens.analyzers.module_groups import json_number, nan_median
from training_lens.core import table_names as tables
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import RUN, DataType, Series
from training_lens.measures.curves import FitEstimate, log_slope, remaining_gain

WINDOWS = 50  # smoothing windows in a run
MIN_VALIDATIONS = 4  # so that the later half has a slope


@AnalyzerRegistry.register
class ConvergenceAnalyzer(DataAnalyzer):
    """The smoothed training loss, its slope against ln(steps), the remaining gain, and the best validation.

    Gives `training`, steps and smoothed losses (medians of a moving window, a fiftieth of the run); `slope`, the change
    of the loss for each e-fold of steps over the later half of the run; `remaining_gain`, how much the loss would fall
    until `until_step` at that slope; both with standard errors. `of` names their loss: validation with four or more
    validations, else training. `until_step` is the planned end, or twice the last step for a run that has reached it.
    Also `best_validation` and `last_validation` with their steps, and `base_loss`. Losses are nats per supervised
    token.
    """

    name = "convergence"
    needs = frozenset({DataType.LOSS})
    gives = (
        *("training", "of", "slope", "remaining_gain", "until_step", "best_validation", "last_validation"),
        "base_loss",
    )

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        training = recording.series(tables.LOSS, "loss")
        validation = _drop_missing(recording.series(tables.EVALUATION, "loss"))
        by_validation = len(validation.steps) >= MIN_VALIDATIONS
        late = _later_half(validation if by_validation else training)
        until = _planned_end(recording, int(late.steps[-1])) if len(late.steps) else None
        return {
            "training": run_curve(smooth_series(training)),
            "of": "validation" if by_validation else "training",
            "slope": _estimate_to_json(log_slope(late.steps, _run_values(late))),
            "remaining_gain": _estimate_to_json(remaining_gain(late.steps, _run_values(late), until or 0)),
            "until_step": until,
            "best_validation": _validation_point(validation, int(np.argmin(_run_values(validation))))
            if len(validation.steps)
            else None,
            "last_validation": _validation_point(validation, -1) if len(validation.steps) else None,
            "base_loss": _first_value(recording.series(tables.EVALUATION, "base_loss")),
        }


def smooth_series(series: Series, most: int = MAX_POINTS) -> Series:
    """Medians over a moving window of a fiftieth of the run, shorter at both ends.

    Args:
        most: steps kept at most, evenly over the run. 100,000 windows would take gigabytes.
    """
    kept = (
        np.unique(np.linspace(0, len(series.steps) - 1, most).round().astype(int))
        if len(series.steps)
        else np.zeros(0, int)
    )
    width = max(1, len(series.steps) // WINDOWS) | 1  # odd, so that it is centred
    padded = np.pad(series.values, ((width // 2, width // 2), (0, 0)), constant_values=np.nan)
    values = np.zeros((len(kept), series.values.shape[1]))
    for column in range(series.values.shape[1]):
        windows = np.lib.stride_tricks.sliding_window_view(padded[:, column], width)  # (steps, width)
        values[:, column] = nan_median(windows[kept])
    return Series(series.steps[kept], series.names, values)


def _drop_missing(series: Series) -> Series:
    """Leave out the steps without a finite number."""
    kept = np.isfinite(series.values).all(1)
    return Series(series.steps[kept], series.names, series.values[kept])


def _later_half(series: Series) -> Series:
    half = len(series.steps) // 2
    return Series(series.steps[half:], series.names, series.values[half:])


def _run_values(series: Series) -> np.ndarray:
    return series.column(RUN) if RUN in series.names else np.zeros(0)


def _planned_end(recording: Recording, last: int) -> int:
    planned = recording.settings.get("total_steps") or 0
    return int(planned) if planned > last else 2 * last


def _estimate_to_json(estimate: FitEstimate) -> dict[str, float | None]:
    return {"value": json_number(estimate.value), "error": json_number(estimate.error)}


def _validation_point(series: Series, index: int) -> dict[str, Any]:
    return {"step": int(series.steps[index]), "loss": json_number(series.column(RUN)[index])}


def _first_value(series: Series) -> float | None:
    known = _run_values(_drop_missing(series))
    return json_number(known[0]) if len(known) else None
