"""The loss on rows that are not trained on, over the run, and which way it goes at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.analysis.findings.evidence import Curve, median_or_nan, read_base_value, read_curve
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.measures.curves import MAD_TO_DEVIATION, log_slope

LEAST = 4  # points, without which a curve has no direction
CERTAIN = 3.0  # how many times its noise a change must be
ABOVE_BEST = 4.0  # how many times the scatter: the best of many points is low by chance
LEAST_RISE = 0.02  # of the lowest loss: less is nothing to act on

Direction = Literal["falls", "flat", "rises", "unknown"]


@dataclass(frozen=True)
class HeldOut:
    """`losses` (points,) in nats per supervised token after `steps`; `start` is that of the base, NaN if unknown.

    `what` is what it was measured on: `validation set`, or `probe set`, which is smaller and measured more often.
    """

    what: str
    steps: np.ndarray
    losses: np.ndarray
    start: float

    @property
    def best_index(self) -> int:
        """The place of the lowest loss."""
        return int(self.losses.argmin())

    @property
    def point_noise(self) -> float:
        """The standard deviation of one point, from what neighbouring points differ beyond the median difference.

        Formula: 1.4826 MAD of the differences, over sqrt(2).
        """
        jumps = np.diff(self.losses)
        return float(MAD_TO_DEVIATION * median_or_nan(np.abs(jumps - median_or_nan(jumps))) / np.sqrt(2))

    @property
    def final_rise(self) -> float:
        """By how much the end (the median of the last quarter) is above the best point."""
        return median_or_nan(self.losses[-max(2, len(self.losses) // 4) :]) - float(self.losses[self.best_index])

    def find_direction(self) -> Direction:
        """Of the later half of the points, against ln(steps), or since the best one.

        A rise must also be 2 % of the lowest loss.
        """
        if len(self.steps) < LEAST:
            return "unknown"
        slope = log_slope(*self.late_half())
        rises = slope.value - CERTAIN * slope.error > 0 or self._is_well_above_best()
        if rises and self.final_rise > LEAST_RISE * self.losses[self.best_index]:
            return "rises"
        return "falls" if slope.value + CERTAIN * slope.error < 0 else "flat"

    def _is_well_above_best(self) -> bool:
        """Whether the end is above the best point by far more than the points since then scatter around a line."""
        since = slice(self.best_index + 1, None)
        steps, losses = self.steps[since], self.losses[since]
        return len(steps) > LEAST and self.final_rise > ABOVE_BEST * measure_scatter(steps, losses)

    def late_half(self) -> Curve:
        """The later half of the points, at least four."""
        first = -max(LEAST, len(self.steps) // 2)
        return self.steps[first:], self.losses[first:]


def measure_scatter(steps: np.ndarray, losses: np.ndarray) -> float:
    """The standard deviation of losses around their line against ln(steps), from the error of its slope."""
    logs = np.log(steps)
    return float(log_slope(steps, losses).error * np.sqrt(((logs - logs.mean()) ** 2).sum()))


def read_held_out(recording: Recording) -> HeldOut:
    """The validation loss, or where it was measured fewer than four times, that of the probe set."""
    validation = _read_losses(recording, "validation set", tables.EVALUATION)
    probe = _read_losses(recording, "probe set", tables.DIVERGENCE)
    return validation if len(validation.steps) >= LEAST or len(probe.steps) <= len(validation.steps) else probe


def _read_losses(recording: Recording, what: str, table: str) -> HeldOut:
    steps, losses = read_curve(recording, table, "loss")
    base = recording.series(table, "base_loss").values
    known = base[np.isfinite(base)]
    return HeldOut(what, steps, losses, float(known[0]) if len(known) else read_base_value(recording, table, "loss"))
