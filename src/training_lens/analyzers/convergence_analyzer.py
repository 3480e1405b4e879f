"""Where the loss is going."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.activation_analyzer import POINTS, curve
from training_lens.analyzers.module_groups import median, number
from training_lens.core import table_names as tables
from training_lens.core.analyzer import DataAnalyzer
from training_lens.core.recording import Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import RUN, DataType, Series
from training_lens.measures.curves import Estimate, remaining_gain, trend

WINDOWS = 50  # a run has so many windows of smoothing
LEAST_VALIDATIONS = 4  # of which the later half then has a slope


@AnalyzerRegistry.register
class ConvergenceAnalyzer(DataAnalyzer):
    """The smoothed training loss, its slope against ln(steps), what is left to gain, and the best validation.

    Gives `training` (steps and smoothed losses: medians of a moving window, a fiftieth of the run), `slope` (change of
    the loss for each e-fold of steps, over the later half of the run) and `remaining_gain` (what the loss would still
    fall until `until_step`, if it kept that slope), each with its standard error, `of` which loss they are (validation
    where there were at least four, else training); `until_step` is the planned end, and twice the last step for a run
    that is there already; `best_validation` with its step, `last_validation` and `base_loss`. Losses are nats per
    supervised token.
    """

    name = "convergence"
    needs = frozenset({DataType.LOSS})
    gives = (
        *("training", "of", "slope", "remaining_gain", "until_step", "best_validation", "last_validation"),
        "base_loss",
    )

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        training = recording.series(tables.LOSS, "loss")
        validation = _taken(recording.series(tables.EVALUATION, "loss"))
        judged = len(validation.steps) >= LEAST_VALIDATIONS
        late = _later_half(validation if judged else training)
        until = _until(recording, int(late.steps[-1])) if len(late.steps) else None
        return {
            "training": curve(smoothed(training)),
            "of": "validation" if judged else "training",
            "slope": _plain(trend(late.steps, _values(late))),
            "remaining_gain": _plain(remaining_gain(late.steps, _values(late), until or 0)),
            "until_step": until,
            "best_validation": _point(validation, int(np.argmin(_values(validation))))
            if len(validation.steps)
            else None,
            "last_validation": _point(validation, -1) if len(validation.steps) else None,
            "base_loss": _first(recording.series(tables.EVALUATION, "base_loss")),
        }


def smoothed(series: Series, most: int = POINTS) -> Series:
    """Medians over a moving window of a fiftieth of the run, which is shorter at its ends.

    Args:
        most: at most so many steps, evenly over the run: a window for each of 100,000 would be gigabytes.
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
        values[:, column] = median(windows[kept])
    return Series(series.steps[kept], series.names, values)


def _taken(series: Series) -> Series:
    """Without steps at which there is no number."""
    kept = np.isfinite(series.values).all(1)
    return Series(series.steps[kept], series.names, series.values[kept])


def _later_half(series: Series) -> Series:
    half = len(series.steps) // 2
    return Series(series.steps[half:], series.names, series.values[half:])


def _values(series: Series) -> np.ndarray:
    return series.of(RUN) if RUN in series.names else np.zeros(0)


def _until(recording: Recording, last: int) -> int:
    planned = recording.settings.get("total_steps") or 0
    return int(planned) if planned > last else 2 * last


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"value": number(estimate.value), "error": number(estimate.error)}


def _point(series: Series, at: int) -> dict[str, Any]:
    return {"step": int(series.steps[at]), "loss": number(series.of(RUN)[at])}


def _first(series: Series) -> float | None:
    known = _values(_taken(series))
    return number(known[0]) if len(known) else None
