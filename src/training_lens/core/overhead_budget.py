"""What the lens costs, and how often it may capture within its share of the training time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from training_lens.config.lens_section import LensSection
from training_lens.core.types import Cadence

SHARES = {  # of the training time, where the config sets no interval: 2 % in all
    Cadence.SCALARS: 0.01,
    Cadence.SPECTRA: 0.0025,
    Cadence.PROBE: 0.005,
    Cadence.SNAPSHOTS: 0.0025,
}
MIN_SCALARS, FIRST_SCALARS = 200, 20  # captures in a run of known length; first steps that are all captured
MIN_SPECTRA = 8  # in a run of known length
MIN_SNAPSHOTS, MAX_SNAPSHOTS = 4, 8  # in a run of known length
SNAPSHOT_STEPS = 500  # between snapshots, in a run of unknown length
STEP_TIME_WINDOW = 10  # steps in the running mean of the step time
INTERVAL_FACTORS = (1, 2, 5)  # times powers of ten


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


class OverheadBudget:
    """Times what the lens does, and gives each cadence the schedule that keeps it within its share.

    `seconds` is the time spent so far by name: collectors, and what serves them all.
    """

    def __init__(self, section: LensSection, total_steps: int | None) -> None:
        self.seconds: dict[str, float] = {}
        self._schedules = {cadence: _build_schedule(cadence, section, total_steps) for cadence in Cadence}
        self._step_costs: dict[Cadence, float] = {}  # seconds of this step's captures
        self._steps, self._step_seconds = 0, 0.0  # seen by this process; running mean
        self._step_start = time.perf_counter()

    def is_due(self, cadence: Cadence, step: int) -> bool:
        return self._schedules[cadence].is_due(step)

    @contextmanager
    def measure(self, name: str, cadence: Cadence | None = None) -> Iterator[None]:
        """Add the block's time to `seconds[name]`, and to what `cadence` spends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            if cadence:
                self.spend(cadence, elapsed)

    def spend(self, cadence: Cadence, seconds: float) -> None:
        """Count seconds against a cadence's share."""
        self._step_costs[cadence] = self._step_costs.get(cadence, 0.0) + seconds

    def has_spent(self, cadence: Cadence) -> bool:
        """Whether this step's captures cost the cadence anything."""
        return cadence in self._step_costs

    def start_step(self) -> None:
        """The step time is measured from here: probe passes and validation do not count."""
        self._step_start = time.perf_counter()

    def end_step(self) -> None:
        """Update the running mean of the step time."""
        self._steps += 1
        elapsed = time.perf_counter() - self._step_start
        self._step_seconds += (elapsed - self._step_seconds) / min(self._steps, STEP_TIME_WINDOW)

    def update_schedules(self) -> None:
        """Adapt all intervals to what this step's captures cost. Call it after `end_step`."""
        for cadence, schedule in self._schedules.items():
            if cadence in self._step_costs:
                schedule.record_capture(self._step_costs.pop(cadence), self._step_seconds)
            else:
                schedule.record_step_time(self._step_seconds)

    @property
    def intervals(self) -> dict[Cadence, int]:
        """The steps from one capture to the next. Set, they are those of another process."""
        return {cadence: schedule.interval for cadence, schedule in self._schedules.items()}

    @intervals.setter
    def intervals(self, intervals: Mapping[Cadence, int]) -> None:
        for cadence, interval in intervals.items():
            self._schedules[cadence].interval = interval


def _build_schedule(cadence: Cadence, section: LensSection, total_steps: int | None) -> CaptureSchedule:
    share = SHARES[cadence]
    if cadence is Cadence.SCALARS:
        every = section.scalars_every
        return CaptureSchedule(every, share, total_steps, least=MIN_SCALARS, most=None, always=FIRST_SCALARS)
    if cadence is Cadence.SNAPSHOTS:
        every = section.snapshot_every or (None if total_steps else SNAPSHOT_STEPS)
        return CaptureSchedule(every, share, total_steps, least=MIN_SNAPSHOTS, most=MAX_SNAPSHOTS)
    if cadence is Cadence.SPECTRA:
        return CaptureSchedule(section.spectra_every, share, total_steps, least=MIN_SPECTRA)
    return CaptureSchedule(section.probe_every, share, total_steps, first_step=0)  # the probe runs before training, too
