"""Values that several findings read from a recording: curves, and the held-out loss with its direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.analyzers.module_groups import finite_points, nan_median, spread_indices
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.measures.curves import log_slope
from training_lens.utils.formatting import pluralize

Curve = tuple[np.ndarray, np.ndarray]  # steps (points,) int64 and values (points,) float64
Direction = Literal["falls", "flat", "rises", "unknown"]
LISTED = 3  # names listed in a text before the rest is counted
ENOUGH = 8  # validations of all rows: with fewer, a sample that is validated more often shows more
LEAST = 4  # points that a curve needs to have a direction
CERTAIN = 3.0  # a change must be this many times its noise
ABOVE_BEST = 4.0  # times the scatter: the best of many points is low by chance
LEAST_RISE = 0.02  # of the lowest loss: a smaller rise is not worth acting on


def read_curve(recording: Recording, table: str, measure: str) -> Curve:
    """A measure of the whole run: the steps after 0 at which it is finite, and its values."""
    steps, values = finite_points(recording, table, measure)
    return steps[steps > 0], values[steps > 0]


def median_over_modules(series: Series) -> Curve:
    """The median over modules, at the steps after 0 at which any module has a finite value."""
    medians = nan_median(np.where(np.isfinite(series.values), series.values, np.nan))
    kept = np.isfinite(medians) & (series.steps > 0)
    return series.steps[kept], medians[kept]


def median_or_nan(values: np.ndarray) -> float:
    """The median; NaN without a warning if `values` is empty."""
    return float(np.median(values)) if len(values) else np.nan


def list_names(names: Sequence[str]) -> str:
    """The first names and the number of the others."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def thin_points(*, x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    """A curve as lists for figures, thinned evenly to at most 400 points, including the last."""
    kept = spread_indices(len(x), 400)
    return {"steps": [int(v) for v in x[kept]], "values": [float(v) for v in y[kept]]}


@dataclass(frozen=True)
class HeldOut:
    """`losses` (points,) in nats per supervised token after `steps`; `start` is the base model's, NaN if unknown.

    `what` names the rows: `validation set`, or `validation sample` or `probe set` with their size and standard error.
    """

    what: str
    steps: np.ndarray
    losses: np.ndarray
    start: float

    @property
    def best_index(self) -> int:
        """The index of the lowest loss."""
        return int(self.losses.argmin())

    @property
    def final_rise(self) -> float:
        """How far the end (the median of the last quarter) is above the best point."""
        return median_or_nan(self.losses[-max(2, len(self.losses) // 4) :]) - float(self.losses[self.best_index])

    def find_direction(self) -> Direction:
        """The trend of the later half against ln(steps), or since the best point: at least 2 % above it to rise."""
        if len(self.steps) < LEAST:
            return "unknown"
        slope = log_slope(*self.late_half())
        steps, losses = self.steps[self.best_index + 1 :], self.losses[self.best_index + 1 :]
        is_well_above_best = len(steps) > LEAST and self.final_rise > ABOVE_BEST * measure_scatter(steps, losses)
        rises = slope.value - CERTAIN * slope.error > 0 or is_well_above_best
        if rises and self.final_rise > LEAST_RISE * self.losses[self.best_index]:
            return "rises"
        return "falls" if slope.value + CERTAIN * slope.error < 0 else "flat"

    def late_half(self) -> Curve:
        """The later half of the points, at least four of them."""
        first = -max(LEAST, len(self.steps) // 2)
        return self.steps[first:], self.losses[first:]


def measure_scatter(steps: np.ndarray, losses: np.ndarray) -> float:
    """The standard deviation of losses around their line against ln(steps), from the standard error of its slope."""
    logs = np.log(steps)
    return float(log_slope(steps, losses).error * np.sqrt(((logs - logs.mean()) ** 2).sum()))


def read_held_out(recording: Recording) -> HeldOut:
    """The validation loss; with fewer than eight validations that of the validation sample, if it has more points; and
    with fewer than four of either the probe set's, if it has more.
    """
    validation = _read_losses(recording, "validation set", tables.EVALUATION)
    if len(validation.steps) < ENOUGH:
        sample = _read_losses(recording, _describe_sample(recording), tables.EVALUATION, "sample_loss")
        validation = sample if len(sample.steps) > len(validation.steps) else validation
    probe = _read_losses(recording, _describe_probe(recording), tables.DIVERGENCE)
    return validation if len(validation.steps) >= LEAST or len(probe.steps) <= len(validation.steps) else probe


def _describe_probe(recording: Recording) -> str:
    """The probe set with its size and the standard error of its last loss, as far as they are known."""
    rows = (recording.manifest.probe or {}).get("examples")
    errors = finite_points(recording, tables.DIVERGENCE, "loss_error")[1]
    return _describe_rows("probe set", rows, errors)


def _describe_sample(recording: Recording) -> str:
    """The validation sample with its size and the standard error of its last loss."""
    rows, errors = recording.settings.get("sample_rows"), finite_points(recording, tables.EVALUATION, "sample_error")[1]
    return _describe_rows("validation sample", rows, errors)


def _describe_rows(what: str, rows: int | None, errors: np.ndarray) -> str:
    known = [pluralize(rows, "row")] if rows else []
    known += [f"standard error {errors[-1]:.2g}"] if len(errors) else []
    return f"{what} ({', '.join(known)})" if known else what


def _read_losses(recording: Recording, what: str, table: str, measure: str = "loss") -> HeldOut:
    steps, losses = finite_points(recording, table, measure)
    base = [*losses[steps == 0], *finite_points(recording, table, "base_loss")[1]]
    return HeldOut(what, steps[steps > 0], losses[steps > 0], float(base[0]) if base else np.nan)
