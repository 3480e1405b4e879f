"""What a curve over steps tells: its slope, what is left to gain, its outliers, and the stairs of memorization.

Points whose value is NaN or infinite are left out of every fit. Standard errors take what the line leaves over as
independent from point to point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real
from numpy import ndarray

MAD_TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
LEAST_POINTS = 3  # on each side of an epoch's end: a line of two has no error


class FitEstimate(NamedTuple):
    """A number and its standard error, in the same unit; NaN where the data do not decide it."""

    value: float
    error: float


def log_slope(steps: Real[ndarray, " points"], values: Float[ndarray, " points"]) -> FitEstimate:
    """The slope of values against ln(steps), which is about straight for a loss: the change for each e-fold of steps.

    Ordinary least squares. Points before step 1 are left out. The slope takes two points at different steps, its error
    three.
    """
    kept = (steps > 0) & np.isfinite(values)
    logs = np.log(steps[kept])
    slopes, errors = _least_squares(np.stack([logs, np.ones_like(logs)], 1), values[kept])
    return FitEstimate(float(slopes[0]), float(errors[0]))


def remaining_gain(
    steps: Real[ndarray, " points"], losses: Float[ndarray, " points"], total_steps: float
) -> FitEstimate:
    """By how much the loss would still fall until `total_steps` if it kept its slope against ln(steps).

    Formula: -slope x ln(total_steps / last step), with the slope's error in proportion; 0 at or after the end. Positive
    is a gain, in the loss's unit. Give only the points of the late part whose slope should go on.
    """
    if not len(steps):
        return FitEstimate(np.nan, np.nan)
    slope, left = log_slope(steps, losses), np.log(max(1.0, total_steps / steps.max()))
    return FitEstimate(float(-slope.value * left), float(slope.error * left))


def robust_z(values: Float[ndarray, " points"]) -> Float[ndarray, " points"]:
    """Each value's distance from the median of all, in units of 1.4826 times their median absolute deviation.

    For normal values that unit is their standard deviation (Iglewicz and Hoaglin 1993, who call 3.5 an outlier), and
    outliers do not widen it. NaN and infinity stay what they are and count for nothing. Where most values are equal,
    those are at 0 and any other at plus or minus infinity.

    Example:
        >>> robust_z(np.array([1.0, 2.0, 3.0, 14.0])).round(2).tolist()
        [-1.01, -0.34, 0.34, 7.76]
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return values.astype(float)
    away = values - np.median(known)
    unit = MAD_TO_DEVIATION * np.median(np.abs(known - np.median(known)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(away == 0, 0.0, away / unit)


class EpochDrop(NamedTuple):
    """By how much the loss falls at once between `step`, an epoch's last, and the next; positive is a fall."""

    step: int
    drop: float
    error: float


def epoch_drops(
    steps: Real[ndarray, " points"], losses: Float[ndarray, " points"], steps_per_epoch: float, window: int
) -> list[EpochDrop]:
    """The fall of the training loss at each epoch's end beyond its trend on both sides: the stairs of memorization.

    Formula: least squares of a line of its own on each side of the boundary; the drop is what the first gives there
    minus what the second gives (a regression discontinuity, Imbens and Lemieux 2008). On data not seen before it is 0
    but for noise, about sqrt(8 / window) times that of one step's loss.

    Args:
        steps: counted from 1; epoch e is steps (e - 1) x steps_per_epoch + 1 to e x steps_per_epoch.
        losses: the training loss of each step, before any smoothing.
        window: steps looked at on each side, at most an epoch. A boundary with fewer than three on a side is left out.
    """
    kept = np.isfinite(losses)
    steps, losses = steps[kept], losses[kept]
    width = min(window, steps_per_epoch)
    last = steps.max() if len(steps) else 0
    boundaries = [round(epoch * steps_per_epoch) for epoch in range(1, int(last / steps_per_epoch) + 1)]
    drops = [_fit_drop(steps - boundary - 0.5, losses, boundary, width) for boundary in boundaries]
    return [drop for drop in drops if drop is not None]


def _fit_drop(away: ndarray, losses: ndarray, boundary: int, width: float) -> EpochDrop | None:
    """The drop where `away`, the distance from between two steps, passes 0; None with too few points around it."""
    near = np.abs(away) < width
    away, after = away[near], (away[near] > 0).astype(float)
    if min(after.sum(), (1 - after).sum()) < LEAST_POINTS:
        return None
    design = np.stack([after, np.ones_like(away), away, after * away], 1)
    jumps, errors = _least_squares(design, losses[near])
    return EpochDrop(boundary, float(-jumps[0]), float(errors[0]))


def _least_squares(design: ndarray, values: ndarray) -> tuple[ndarray, ndarray]:
    """Coefficients of the columns of `design` (points, columns) and their standard errors, NaN where undecided."""
    points, columns = design.shape
    if points < columns or np.linalg.matrix_rank(design) < columns:
        return np.full(columns, np.nan), np.full(columns, np.nan)
    inverse = np.linalg.pinv(design)  # (columns, points)
    coefficients = inverse @ values
    rest, freedom = values - design @ coefficients, points - columns
    variance = rest @ rest / freedom if freedom else np.nan
    return coefficients, np.sqrt(variance * (inverse**2).sum(1))
