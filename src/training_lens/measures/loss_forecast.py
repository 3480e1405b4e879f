"""The held-out loss of a run of twice the steps, foretold from a run's own held-out losses.

The law is empirical. A run of 2 N steps, with a schedule over its own length, changes the best loss by a multiple of
what the later half of the N steps gained. The multiples of measured pairs of runs give the interval: a fresh run's
multiple is within it as often as it says, if it is exchangeable with them (split conformal prediction, arXiv
1604.04173).
`benchmarks/forecast.py` measures the pairs and counts the hits on others than those that gave the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real
from numpy import ndarray

LEAST_POINTS = 6  # held-out losses after step 0
FLOOR = 0.03  # of the gain over the base: a later half that gained less says no more than one that gained this


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
    if len(steps) < LEAST_POINTS or not gain > 0:
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
