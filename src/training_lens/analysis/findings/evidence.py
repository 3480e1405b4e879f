"""Values that several findings read from a recording, as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series

Curve = tuple[np.ndarray, np.ndarray]  # steps (points,) int64 and values (points,) float64
LISTED = 3  # names listed in a text before the rest is counted


def read_curve(recording: Recording, table: str, measure: str) -> Curve:
    """A measure of the whole run: the steps after 0 at which it is finite, and its values."""
    series = recording.series(table, measure)
    values = series.values[:, 0] if series.names else np.zeros(0)
    kept = np.isfinite(values) & (series.steps > 0)
    return series.steps[kept], values[kept]


def median_over_modules(series: Series) -> Curve:
    """The median over modules, at the steps at which any module has a finite value."""
    kept = np.isfinite(series.values).any(1) & (series.steps > 0)
    values = np.where(np.isfinite(series.values), series.values, np.nan)[kept]
    return series.steps[kept], np.nanmedian(values, axis=1) if len(values) else np.zeros(0)


def median_or_nan(values: np.ndarray) -> float:
    """The median; NaN without a warning if `values` is empty."""
    return float(np.median(values)) if len(values) else np.nan


def read_base_value(recording: Recording, table: str, measure: str) -> float:
    """A measure of the whole run at step 0; NaN if there is none."""
    series = recording.series(table, measure)
    known = series.values[(series.steps == 0)]
    return float(known[0, 0]) if known.size else np.nan


def divide_by_base(recording: Recording, measure: str) -> Series:
    """A norm of the adapter's change (norm_update, norm_step) divided by that of the frozen weight, by module.

    Modules without a measured frozen weight are left out.
    """
    series, base = recording.series(tables.WEIGHTS, measure), recording.series(tables.BASE, "norm")
    norms = dict(zip(base.names, base.values[0], strict=True)) if len(base.steps) else {}
    known = [i for i, name in enumerate(series.names) if norms.get(name, 0) > 0]
    names = tuple(series.names[i] for i in known)
    return Series(series.steps, names, series.values[:, known] / np.array([norms[name] for name in names]))


def read_gradient_norms(recording: Recording) -> Series:
    """|(dL/dA, dL/dB)| of each module, before clipping."""
    a, b = (recording.series(tables.GRADIENTS, measure) for measure in ("norm_a", "norm_b"))
    if a.names != b.names or not np.array_equal(a.steps, b.steps):
        return b
    return Series(b.steps, b.names, np.hypot(a.values, b.values))


def total_steps(recording: Recording) -> int | None:
    """The planned number of steps; None if unknown."""
    total = recording.settings.get("total_steps")
    return int(total) if total else None


def find_warmup_end(recording: Recording) -> int:
    """The first step with the highest learning rate; 0 if no rate was captured."""
    steps, rates = read_curve(recording, tables.LOSS, "lr")
    return int(steps[rates.argmax()]) if len(steps) else 0


def list_names(names: Sequence[str]) -> str:
    """The first names and the number of the others."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def thin_points(*, x: np.ndarray, y: np.ndarray, most: int = 400) -> dict[str, list[float]]:
    """A curve as lists for figures, thinned evenly to at most `most` points, including the last."""
    kept = np.unique(np.linspace(0, max(0, len(x) - 1), min(len(x), most)).round().astype(int))
    return {"steps": [int(v) for v in x[kept]], "values": [float(v) for v in y[kept]]}
