"""The gradients' norms and directions, and the proof that they were captured correctly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.lora_analyzer import find_nonfinite
from training_lens.analyzers.module_groups import group_series, json_number, json_numbers, nan_median
from training_lens.core import table_names as tables
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import DataType, Series

END_SHARE = 0.1  # of the run: its end


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
            "certificate": certify_capture(recording.series(tables.GRADIENTS, "self_check")),
            "not_finite": find_nonfinite(norms),
        }


def gradient_norms(recording: Recording) -> Series:
    """The norm of (dL/dA, dL/dB) of each module over the steps."""
    a, b = (recording.series(tables.GRADIENTS, measure) for measure in ("norm_a", "norm_b"))
    return Series(a.steps, a.names, np.hypot(a.values, b.values))


def _median_by_group(norms: Series, recording: Recording, by: Any) -> dict[str, float | None]:
    together = group_series(norms, recording.modules, by, norms=True)
    return dict(zip(together.names, json_numbers(nan_median(together.values.T)), strict=True))


def _median_cosines(series: Series) -> dict[str, float | None]:
    late = series.values[len(series.values) - max(1, int(END_SHARE * len(series.values))) :]
    return {"run": _median_of_all(series.values), "end": _median_of_all(late)}


def _median_of_all(values: np.ndarray) -> float | None:
    return json_number(nan_median(values.reshape(1, -1))[0])


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
