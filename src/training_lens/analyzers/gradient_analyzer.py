"""What the gradients were, and the proof that they were captured as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.lora_analyzer import first_not_finite
from training_lens.analyzers.module_groups import grouped, median, number, numbers
from training_lens.core import table_names as tables
from training_lens.core.analyzer import DataAnalyzer
from training_lens.core.recording import Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import DataType, Series

LATE = 0.1  # the last part of a run, for what is typical of its end


@AnalyzerRegistry.register
class GradientAnalyzer(DataAnalyzer):
    """Norms by layer, steadiness of direction, and the certificate of the capture.

    Gives `steps`, how many were captured; `norm_by_layer` and `norm_by_kind`, the median over steps of the norm of
    (dL/dA, dL/dB) of all modules there; `directions`, medians over modules and steps of the cosines, in the whole run
    and in its last tenth; `certificate`: the largest residual of B^T dB = dA A^T (`analyzers.directions.self_check`)
    with its module and step, and how many values it is the largest of; `not_finite`, the modules whose gradient was NaN
    or infinite, with the first such step.
    """

    name = "gradients"
    needs = frozenset({DataType.ADAPTER_GRADIENTS})
    gives = ("steps", "norm_by_layer", "norm_by_kind", "directions", "certificate", "not_finite")

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        norms = gradient_norms(recording)
        directions = {what: recording.series(tables.GRADIENTS, what) for what in ("cosine_previous", "cosine_mean")}
        return {
            "steps": len(norms.steps),
            "norm_by_layer": _by(norms, recording, "layer"),
            "norm_by_kind": _by(norms, recording, "kind"),
            "directions": {what: _typical(series) for what, series in directions.items()},
            "certificate": certificate(recording.series(tables.GRADIENTS, "self_check")),
            "not_finite": first_not_finite(norms),
        }


def gradient_norms(recording: Recording) -> Series:
    """The norm of (dL/dA, dL/dB) of each module over the steps."""
    a, b = (recording.series(tables.GRADIENTS, measure) for measure in ("norm_a", "norm_b"))
    return Series(a.steps, a.names, np.hypot(a.values, b.values))


def _by(norms: Series, recording: Recording, by: Any) -> dict[str, float | None]:
    together = grouped(norms, recording.modules, by, norms=True)
    return dict(zip(together.names, numbers(median(together.values.T)), strict=True))


def _typical(series: Series) -> dict[str, float | None]:
    late = series.values[len(series.values) - max(1, int(LATE * len(series.values))) :]
    return {"run": _median_of_all(series.values), "end": _median_of_all(late)}


def _median_of_all(values: np.ndarray) -> float | None:
    return number(median(values.reshape(1, -1))[0])


def certificate(residuals: Series) -> dict[str, Any]:
    """The largest residual with its module and step, and of how many; None where nothing was checked."""
    known = ~np.isnan(residuals.values)
    if not known.any():
        return {"largest": None, "module": None, "step": None, "checked": 0}
    row, column = np.unravel_index(np.nanargmax(residuals.values), residuals.values.shape)
    return {
        "largest": number(residuals.values[row, column]),
        "module": residuals.names[column],
        "step": int(residuals.steps[row]),
        "checked": int(known.sum()),
    }
