"""How much of the processor other programs use while something is measured."""

from __future__ import annotations

import time
from typing import Any

import psutil

BUSY_KINDS = ("user", "nice", "system", "irq", "softirq", "steal")  # those that the system counts; steal: of other VMs


class OtherPrograms:
    """Watches, from when it is made, what programs other than this process use of all cores."""

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float:
        """The share of all cores that they used so far, 0 to 1."""
        busy, own = _busy_seconds() - self._busy, _own_seconds() - self._own
        capacity = (time.perf_counter() - self._started) * (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, busy - own) / capacity) if capacity > 0 else 0.0


def _busy_seconds() -> float:
    times: Any = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in BUSY_KINDS))


def _own_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)
