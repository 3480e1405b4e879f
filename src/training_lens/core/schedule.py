"""At which steps a capture is due."""

from __future__ import annotations

import math

INTERVAL_FACTORS = (1, 2, 5)


class CaptureSchedule:
    """Due at every `every`-th step, or as often as `share` of the training time allows.

    Without `every` the interval is 1, 2, 5, 10, 20, 50, ...: the smallest that keeps the share, given the seconds of
    a capture and of a step. So two runs have most of their steps in common. In a run of known length there are about
    `least` to `most` captures, whatever they cost. Step `first_step` is always due.

    Args:
        every: a fixed interval in steps; None: chosen by cost.
        share: of the training time, 0 to 1.
        most: None: no limit.
        always: this many first steps are due at any cost, and so is the last.
    """

    def __init__(
        self,
        every: int | None,
        share: float,
        total_steps: int | None = None,
        *,
        least: int = 0,
        most: int | None = 200,
        always: int = 0,
        first_step: int = 1,
    ) -> None:
        self._is_fixed, self._share, self._first = every is not None, share, first_step
        self._always, self._last = (always, total_steps) if always and not self._is_fixed else (0, None)
        self._longest = round_interval(total_steps / least) if total_steps and least else None
        self._shortest = every if every is not None else round_interval((total_steps or 0) / (most or math.inf))
        self._last_seconds = self._cheaper_seconds = math.inf  # of the last capture; of the cheaper of the last two
        self.interval = self._shortest

    def is_due(self, step: int) -> bool:
        if step == self._first or 0 < step <= self._always:
            return True
        return step > 0 and (step % self.interval == 0 or step == self._last)

    def record_capture(self, seconds: float, step_seconds: float) -> None:
        """Adapt the interval to a capture's cost. A single slow capture among fast ones changes nothing."""
        self._cheaper_seconds, self._last_seconds = min(seconds, self._last_seconds), seconds
        self.record_step_time(step_seconds)

    def record_step_time(self, step_seconds: float) -> None:
        """Adapt the interval to the step time: the first steps of a run are slower than the rest."""
        if not self._is_fixed and step_seconds > 0 and self._cheaper_seconds < math.inf:
            wanted = round_interval(self._cheaper_seconds / (self._share * step_seconds))
            self.interval = max(self._shortest, min(wanted, self._longest or wanted))


def round_interval(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    power = 1
    while True:
        for factor in INTERVAL_FACTORS:
            if factor * power >= least:
                return factor * power
        power *= 10
