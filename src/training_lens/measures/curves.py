"""Curves over steps: the slope, the remaining gain, outliers, the drops at epoch ends that show memorization, and the
held-out loss of a run of twice the steps.

Every fit leaves out points that are NaN or infinite. Standard errors assume independent residuals.

The forecast's law is empirical. A run of 2 N steps, with a schedule over its own length, changes the best loss by a
multiple of what the later half of the N steps gained. The multiples of measured pairs of runs give the interval: a
fresh run's multiple is within it as often as it says, if it is exchangeable with them (split conformal prediction,
arXiv 1604.04173). `benchmarks/forecast.py` measures the pairs and counts the hits on others than those that gave the
interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real
from numpy import ndarray

MAD_TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
NORMAL_95 = 1.96  # standard errors on each side of a 95 % interval of a normal distribution
LEAST_POINTS = 3  # on each side of an epoch's end: a line through two points has no error
FEWEST_LOSSES = 6  # held-out losses after step 0
FLOOR = 0.03  # of the gain over the base: a later half that gained less says no more than one that gained this


class FitEstimate(NamedTuple):
    """A number and its standard error, in the same unit; NaN if the data do not determine it."""

    value: float
    error: float


def log_slope(steps: Real[ndarray, " points"], values: Float[ndarray, " points"]) -> FitEstimate:
    """The slope of values against ln(steps), where a loss is about linear: the change for each e-fold of steps.

    Ordinary least squares. Points before step 1 are left out. The slope needs two points at different steps, its error
    three.
    """
    kept = (steps > 0) & np.isfinite(values)
    logs = np.log(steps[kept])
    slopes, errors = _least_squares(np.stack([logs, np.ones_like(logs)], 1), values[kept])
    return FitEstimate(float(slopes[0]), float(errors[0]))


def remaining_gain(
    steps: Real[ndarray, " points"], losses: Float[ndarray, " points"], total_steps: float
) -> FitEstimate:
    """How much the loss would still fall until `total_steps` at its present slope against ln(steps).

    Formula: -slope x ln(total_steps / last step), and the slope's error scaled alike; 0 at or after the end.
    Positive is a gain, in the loss's unit. Give only the late points whose slope should be continued.
    """
    if not len(steps):
        return FitEstimate(np.nan, np.nan)
    slope, log_ratio = log_slope(steps, losses), np.log(max(1.0, total_steps / steps.max()))
    return FitEstimate(float(-slope.value * log_ratio), float(slope.error * log_ratio))


def robust_z(values: Float[ndarray, " points"]) -> Float[ndarray, " points"]:
    """Each value's distance from the median of all, in units of 1.4826 times their median absolute deviation.

    For normal values the unit is their standard deviation, and outliers do not widen it (Iglewicz and Hoaglin 1993, who
    call 3.5 an outlier). NaN and infinity are ignored and stay as they are. If most values are equal, these are at 0
    and all others at plus or minus infinity.

    Example:
        >>> robust_z(np.array([1.0, 2.0, 3.0, 14.0])).round(2).tolist()
        [-1.01, -0.34, 0.34, 7.76]
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return values.astype(float)
    away = values - np.median(known)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(away == 0, 0.0, away / _robust_deviation(known))


def point_noise(values: Float[ndarray, " points"]) -> float:
    """The standard deviation of one point of a curve, from the differences between neighbours; NaN below two points.

    Formula: 1.4826 MAD of the differences, over sqrt(2). A trend that is even over the points adds nothing.
    """
    return _robust_deviation(np.diff(values)) / math.sqrt(2) if len(values) > 1 else math.nan


def _robust_deviation(values: ndarray) -> float:
    return float(MAD_TO_DEVIATION * np.median(np.abs(values - np.median(values))))


class EpochDrop(NamedTuple):
    """How much the loss drops between `step`, an epoch's last, and the next step; positive is a fall."""

    step: int
    drop: float
    error: float


def epoch_drops(
    steps: Real[ndarray, " points"], losses: Float[ndarray, " points"], steps_per_epoch: float, window: int
) -> list[EpochDrop]:
    """The drop of the training loss at each epoch's end, beyond the trend on both sides: a sign of memorization.

    Formula: one least-squares line on each side of the boundary; the drop is the first line's value there minus the
    second's (a regression discontinuity, Imbens and Lemieux 2008). On unseen data it is noise around 0, about
    sqrt(8 / window) times that of one step's loss.

    Args:
        steps: counted from 1; epoch e is steps (e - 1) x steps_per_epoch + 1 to e x steps_per_epoch.
        losses: the training loss of each step, not smoothed.
        window: steps on each side, at most an epoch. A boundary with fewer than three on a side is left out.
    """
    kept = np.isfinite(losses)
    steps, losses = steps[kept], losses[kept]
    width = min(window, steps_per_epoch)
    last = steps.max() if len(steps) else 0
    boundaries = [round(epoch * steps_per_epoch) for epoch in range(1, int(last / steps_per_epoch) + 1)]
    drops = [_fit_drop(steps - boundary - 0.5, losses, boundary, width) for boundary in boundaries]
    return [drop for drop in drops if drop is not None]


def _fit_drop(away: ndarray, losses: ndarray, boundary: int, width: float) -> EpochDrop | None:
    """The drop where `away`, the distance from the boundary between two steps, passes 0; None with too few points."""
    near = np.abs(away) < width
    away, after = away[near], (away[near] > 0).astype(float)
    if min(after.sum(), (1 - after).sum()) < LEAST_POINTS:
        return None
    design = np.stack([after, np.ones_like(away), away, after * away], 1)
    jumps, errors = _least_squares(design, losses[near])
    return EpochDrop(boundary, float(-jumps[0]), float(errors[0]))


def _least_squares(design: ndarray, values: ndarray) -> tuple[ndarray, ndarray]:
    """Coefficients of the columns of `design` (points, columns) and their standard errors, NaN if undetermined."""
    points, columns = design.shape
    if points < columns or np.linalg.matrix_rank(design) < columns:
        return np.full(columns, np.nan), np.full(columns, np.nan)
    inverse = np.linalg.pinv(design)  # (columns, points)
    coefficients = inverse @ values
    residuals, freedom = values - design @ coefficients, points - columns
    variance = residuals @ residuals / freedom if freedom else np.nan
    return coefficients, np.sqrt(variance * (inverse**2).sum(1))


def quadratic_minimum(
    x: Float[ndarray, " points"], curves: Float[ndarray, "*draws points"]
) -> Float[ndarray, "*draws"]:
    """Where a parabola through each curve has its minimum, by least squares; NaN where it has none (not convex).

    Exact for a loss that is quadratic in x: the minimum of a + b x + c x^2 is at -b / (2 c). Needs three points.
    """
    middle = x.mean()
    powers = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], 1)  # (points, 3)
    _, slope, bend = np.moveaxis(curves @ np.linalg.pinv(powers).T, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bend > 0, middle - slope / (2 * bend), np.nan)


@dataclass(frozen=True)
class ForecastLaw:
    """`low` and `high`: the multiples between which a share of `confidence` lie; `pairs` gave them.

    `most_late`: the largest share of the gain that the later half made in any pair; beyond it the law says nothing.
    """

    low: float
    high: float
    confidence: float
    most_late: float
    pairs: int


@dataclass(frozen=True)
class LossForecast:
    """The change of the best held-out loss, nats per token, with twice the steps: from `low` to `high`."""

    low: float
    high: float
    confidence: float
    pairs: int


# benchmarks/results/forecast.json
MEASURED_LAW = ForecastLaw(low=-2.83, high=1.09, confidence=0.9, most_late=1.05, pairs=40)


def measure_late_gain(
    steps: Real[ndarray, " points"], losses: Float[ndarray, " points"], base: float
) -> tuple[float, float] | None:
    """The gain of the best loss over the base's, and the share of it that came after half of the steps.

    None for fewer than six points, or if no loss is below the base's.

    Args:
        steps: after 0, ascending; the loss at half of the last one is interpolated.

    Example:
        >>> measure_late_gain(np.array([1, 2, 3, 4, 5, 6]), np.array([5.0, 4.0, 3.0, 2.0, 2.0, 2.0]), 6.0)
        (4.0, 0.25)
    """
    gain = base - float(losses.min()) if len(losses) else 0.0
    if len(steps) < FEWEST_LOSSES or not gain > 0:
        return None
    half = float(np.interp(steps[-1] / 2, [0, *steps], [base, *losses]))
    return gain, (half - float(losses.min())) / gain


def measure_multiple(late: float, gain: float, change: float) -> float:
    """A measured change of the loss as a multiple of what the later half gained, at least `FLOOR` of the gain."""
    return change / (gain * max(late, FLOOR))


def fit_law(lates: Sequence[float], multiples: Sequence[float], confidence: float) -> ForecastLaw:
    """The order statistics that n multiples and a fresh one leave outside with probability 1 - `confidence` at most.

    With fewer pairs than 2 / (1 - confidence) - 1 these are the least and the greatest, which hold less.
    """
    ordered = np.sort(multiples)
    beyond = math.floor(round((1 - confidence) / 2 * (len(ordered) + 1), 9))  # of a fresh run, below and above
    inner = max(0, beyond - 1)
    return ForecastLaw(float(ordered[inner]), float(ordered[-1 - inner]), confidence, max(lates), len(ordered))


def forecast_loss(
    law: ForecastLaw, steps: Real[ndarray, " points"], losses: Float[ndarray, " points"], base: float
) -> LossForecast | None:
    """The change that twice the steps would make; None where `measure_late_gain` or the law says nothing."""
    found = measure_late_gain(steps, losses, base)
    if found is None or found[1] > law.most_late:
        return None
    scale = found[0] * max(found[1], FLOOR)
    return LossForecast(scale * law.low, scale * law.high, law.confidence, law.pairs)
