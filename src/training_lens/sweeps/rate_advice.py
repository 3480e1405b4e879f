"""Which learning rate the held-out losses of short runs advise: a parabola in ln(rate), with its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from training_lens.evaluation.evaluator import TokenSums
from training_lens.evaluation.verdict import Interval
from training_lens.measures.curves import MAD_TO_DEVIATION, quadratic_minimum

NEIGHBOURS = 2  # rates on each side of the best that the parabola is fitted to
LARGEST_FLAT_SHARE = 0.05  # of the draws that may have no minimum
DRAWS = 1000


@dataclass(frozen=True)
class RateAdvice:
    """What the runs say.

    `kind`: `advised`; `edge`, the best rate is the lowest or highest that ended, so the grid must move; or `flat`, the
    noise hides where the minimum is. `interval` is the 95 % interval of the minimum. `gain_over_default` is the loss at
    the best rate less that at the middle of the grid, with its interval over rows and seeds.
    """

    kind: Literal["advised", "edge", "flat"]
    rate: float | None
    interval: Interval | None
    best: float
    gain_over_default: float
    gain_interval: Interval | None
    seed_noise: float | None  # the typical standard deviation of one run's loss at one rate, nats; None with one seed
    reason: str
    next_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class RateLosses:
    """Held-out losses of runs that ended, by rate (ascending) and seed; the same rows for all.

    `sums[i]` are those of `rates[i]`, one for each seed that it ran with.
    """

    rates: tuple[float, ...]
    sums: tuple[tuple[TokenSums, ...], ...]

    def mean_losses(self) -> np.ndarray:
        """(rates,), over rows and seeds."""
        return np.array([np.mean([_loss(sums) for sums in seeds]) for seeds in self.sums])

    def seed_noise(self) -> float | None:
        """The typical standard deviation of one run's loss at one rate, less what a seed changes at all rates alike.

        From the differences of two seeds, whose variance is twice as large: 1.4826 times their median absolute
        deviation, since rates that are too high are far noisier than the others. None with one seed, or at one rate.
        """
        apart = self._seed_differences()
        known = np.abs(apart[np.isfinite(apart)])
        return MAD_TO_DEVIATION * float(np.median(known)) / math.sqrt(2) if len(known) > 1 else None

    def rate_noise(self) -> np.ndarray:
        """(rates,): that of one run at each rate: the typical one, or what its own two seeds show if that is more."""
        own = np.abs(np.nan_to_num(self._seed_differences())) / math.sqrt(2)
        noise: np.ndarray = np.maximum(self.seed_noise() or 0.0, own)
        return noise

    def _seed_differences(self) -> np.ndarray:
        """(rates,): the second seed's loss less the first's, less the median of these; NaN where there is one seed."""
        apart = [_loss(seeds[1]) - _loss(seeds[0]) if len(seeds) > 1 else math.nan for seeds in self.sums]
        found = np.array(apart)
        return found - np.nanmedian(found) if np.isfinite(found).any() else found

    def draw_losses(self, seed: int = 0) -> np.ndarray:
        """(draws, rates): rows resampled for all runs alike, and the noise of seeds added to each run."""
        generator = np.random.default_rng(seed)
        tokens = self.sums[0][0].tokens
        weights = generator.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), size=DRAWS)  # (draws, rows)
        means = [np.mean([weights @ sums.nll for sums in seeds], 0) / (weights @ tokens) for seeds in self.sums]
        noise = self.rate_noise() / np.sqrt([len(seeds) for seeds in self.sums])
        return np.stack(means, 1) + noise * generator.standard_normal((DRAWS, len(self.rates)))


def _loss(sums: TokenSums) -> float:
    return float(sums.nll.sum() / sums.tokens.sum())


def advise_rate(losses: RateLosses, default: float, tried: Sequence[float], factor: float) -> RateAdvice:
    """The advice of runs at `tried` rates, neighbours `factor` apart, of which some ended (`losses`).

    The minimum is that of a parabola in ln(rate) through the best rate and two on each side (least squares). Its
    interval holds 95 % of the minima of draws in which rows are resampled and the noise of two seeds is added.
    """
    mean, rates = losses.mean_losses(), np.array(losses.rates)
    draws, at = losses.draw_losses(), int(mean.argmin())
    middle = int(np.abs(np.log(rates / default)).argmin())
    low, high = np.percentile(draws[:, at] - draws[:, middle], [2.5, 97.5])
    known = RateAdvice(
        kind="flat",
        rate=None,
        interval=None,
        best=float(rates[at]),
        gain_over_default=float(mean[at] - mean[middle]),
        gain_interval=(float(low), float(high)),
        seed_noise=losses.seed_noise(),
        reason="",
    )
    if at in (0, len(rates) - 1):
        reason, following = _describe_edge(rates, at, tried, factor)
        return replace(known, kind="edge", reason=reason, next_rates=following)
    near = slice(max(0, at - NEIGHBOURS), at + NEIGHBOURS + 1)
    return _fit_minimum(known, rates[near], mean[near], draws[:, near])


def _describe_edge(rates: np.ndarray, at: int, tried: Sequence[float], factor: float) -> tuple[str, tuple[float, ...]]:
    """Why the best rate, at an end of those whose runs ended, decides nothing, and the rates to try next."""
    best, upwards = rates[at], at > 0 or len(rates) == 1
    if any(rate > best for rate in tried) if upwards else any(rate < best for rate in tried):
        # the minimum is bracketed, by a rate that has no held-out loss
        reason, following = "and the next one was stopped", best * math.sqrt(factor) ** np.arange(-3, 4)
    else:
        end, powers = ("highest", np.arange(-1, 6)) if upwards else ("lowest", np.arange(-5, 2))
        reason, following = f"the {end} of the grid", best * factor**powers
    return f"the best rate is {best:.2g}, {reason}", tuple(float(f"{rate:.1e}") for rate in following)


def _fit_minimum(known: RateAdvice, rates: np.ndarray, mean: np.ndarray, draws: np.ndarray) -> RateAdvice:
    """The advice with the minimum of the parabola; `flat` where it is outside of these rates in over 5 % of draws."""
    logs = np.log(rates)
    minimum, drawn = quadratic_minimum(logs, mean), quadratic_minimum(logs, draws)
    inside = (drawn >= logs[0]) & (drawn <= logs[-1])  # false for NaN: not convex
    if not logs[0] <= minimum <= logs[-1] or inside.mean() < 1 - LARGEST_FLAT_SHARE:
        return replace(known, reason=f"the noise hides the minimum between {rates[0]:.2g} and {rates[-1]:.2g}")
    low, high = np.exp(np.percentile(drawn[inside], [2.5, 97.5]))
    rate = float(f"{math.exp(minimum):.1e}")
    return replace(known, kind="advised", rate=rate, interval=(float(low), float(high)))
