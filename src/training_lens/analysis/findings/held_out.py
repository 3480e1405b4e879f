"""The loss on held-out rows over the run, and its direction at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training_lens.analysis.findings.evidence import Curve, median_or_nan, read_base_value, read_curve
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.measures.curves import MAD_TO_DEVIATION, log_slope

LEAST = 4  # points that a curve needs to have a direction
CERTAIN = 3.0  # a change must be this many times its noise
ABOVE_BEST = 4.0  # times the scatter: the best of many points is low by chance
LEAST_RISE = 0.02  # of the lowest loss: a smaller rise is not worth acting on

Direction = Literal["falls", "flat", "rises", "unknown"]


@dataclass(frozen=True)
class HeldOut:
    """`losses` (points,) in nats per supervised token after `steps`; `start` is the base model's, NaN if unknown.

    `what` names the rows: `validation set`, or `probe set`, which is smaller and measured more often.
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
    def point_noise(self) -> float:
        """The standard deviation of one point, estimated from the differences between neighbouring points.

        Formula: 1.4826 MAD of the differences, over sqrt(2).
        """
        jumps = np.diff(self.losses)
        return float(MAD_TO_DEVIATION * median_or_nan(np.abs(jumps - median_or_nan(jumps))) / np.sqrt(2))

    @property
    def final_rise(self) -> float:
        """How far the end (the median of the last quarter) is above the best point."""
        return median_or_nan(self.losses[-max(2, len(self.losses) // 4) :]) - float(self.losses[self.best_index])

    def find_direction(self) -> Direction:
        """The trend of the later half against ln(steps), or since the best point.

        A rise must also exceed 2 % of the lowest loss.
        """
        if len(self.steps) < LEAST:
            return "unknown"
        slope = log_slope(*self.late_half())
        rises = slope.value - CERTAIN * slope.error > 0 or self._is_well_above_best()
        if rises and self.final_rise > LEAST_RISE * self.losses[self.best_index]:
            return "rises"
        return "falls" if slope.value + CERTAIN * slope.error < 0 else "flat"

    def _is_well_above_best(self) -> bool:
        """Whether the end is above the best point by far more than the scatter of the points since then."""
        since = slice(self.best_index + 1, None)
        steps, losses = self.steps[since], self.losses[since]
        return len(steps) > LEAST and self.final_rise > ABOVE_BEST * measure_scatter(steps, losses)

    def late_half(self) -> Curve:
        """The later half of the points, at least four of them."""
        first = -max(LEAST, len(self.steps) // 2)
        return self.steps[first:], self.losses[first:]


def measure_scatter(steps: np.ndarray, losses: np.ndarray) -> float:
    """The standard deviation of losses around their line against ln(steps), from the standard error of its slope."""
    logs = np.log(steps)
    return float(log_slope(steps, losses).error * np.sqrt(((logs - logs.mean()) ** 2).sum()))


def read_held_out(recording: Recording) -> HeldOut:
    """The validation loss, or the probe set's loss if there are fewer than four validations."""
    validation = _read_losses(recording, "validation set", tables.EVALUATION)
    probe = _read_losses(recording, "probe set", tables.DIVERGENCE)
    return validation if len(validation.steps) >= LEAST or len(probe.steps) <= len(validation.steps) else probe


def _read_losses(recording: Recording, what: str, table: str) -> HeldOut:
    steps, losses = read_curve(recording, table, "loss")
    base = recording.series(table, "base_loss").values
    known = base[np.isfinite(base)]
    return HeldOut(what, steps, losses, float(known[0]) if len(known) else read_base_value(recording, table, "loss"))
