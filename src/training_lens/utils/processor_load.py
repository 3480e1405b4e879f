"""How much of the processor other programs use, and what our threads do where they do."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil

SPIN_COUNT = "GOMP_SPINCOUNT"  # how often a thread of torch's OpenMP looks for the others before it sleeps
SHORT_SPIN = "1000"  # microseconds; its own count is for machines that do nothing else, a good part of a millisecond
BUSY_CORES = 0.5  # that other programs use of those that our threads need

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


def share_busy_cores(others: OtherPrograms) -> None:
    """Let threads that wait for each other sleep soon, where other programs use the cores; before torch is loaded.

    A thread whose core another program has keeps all others waiting. As long as they spin, it cannot move to the core
    of one that waits, and a step takes several times as long. On an idle machine they spin, which saves waking them up.
    No number depends on it. What the user has set stays.
    """
    if SPIN_COUNT in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    cores = psutil.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    needed = int(threads) if threads.isdecimal() else cores
    if others.share() * cores + needed >= cores + BUSY_CORES:
        os.environ[SPIN_COUNT] = SHORT_SPIN


def _busy_seconds() -> float:
    times: Any = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in BUSY_KINDS))


def _own_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)
