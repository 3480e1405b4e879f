"""SIGINT, SIGTERM, Windows' Ctrl+Break: the first one asks the loop to stop after its step, a second one at once."""

from __future__ import annotations

import signal
from contextlib import suppress
from types import FrameType
from typing import Any

import torch

from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)
HANDLED: list[signal.Signals] = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
]


class SignalListener:
    """A context manager that records the signal received in its block as `number`; 0: none. `number` stays afterwards.

    Does nothing outside the main thread, which alone may handle signals.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def sum_numbers(self, processes: Processes) -> int:
        """The sum of the signal numbers over all processes of the run; synchronizes them if there are several."""
        if processes.count == 1:
            return self.number
        return int(processes.reduce_sum(torch.tensor(float(self.number))).item())

    def __enter__(self) -> SignalListener:
        def record(number: int, _frame: FrameType | None) -> None:
            if self.number:
                raise KeyboardInterrupt
            self.number = number if number == signal.SIGTERM else signal.SIGINT
            logger.warning("%s: saving after this step, then leaving", signal.Signals(number).name)

        self._before = {}
        with suppress(ValueError):  # not the main thread
            self._before = {number: signal.signal(number, record) for number in HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
