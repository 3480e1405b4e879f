"""The sum of the adapter's gradients over all processes, sent while the last backward pass still runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from training_lens.utils.processes import Processes

MOST_BUCKETS = 4
LEAST_BYTES = 2**20  # of a bucket: a smaller message costs its delay, whatever it holds


class GradientSum:
    """Sums a step's gradients over all processes. They lie in one flat tensor, which is sent in a few buckets.

    A bucket is sent as soon as the step's last backward pass has formed its gradients; that pass goes from the last
    layer to the first, so the buckets do, too. The order of buckets is the same everywhere, whatever the order in which
    gradients come. Does nothing for a single process.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], processes: Processes) -> None:
        self._processes = processes
        self._is_last = False  # whether the backward pass that runs is the step's last
        self._works: list[Any] = []
        self._slots: dict[torch.nn.Parameter, tuple[int, Tensor]] = {}  # its bucket, and its place in the flat tensor
        self._buckets: list[Tensor] = []
        self._missing: list[int] = []
        if processes.count == 1:
            return
        backwards = list(reversed(parameters))
        for parameter in backwards:
            parameter.register_post_accumulate_grad_hook(self._take)
        sizes = [parameter.numel() for parameter in backwards]
        self._flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
        ends = _cut_evenly(sizes, max(LEAST_BYTES // 4, -(-sum(sizes) // MOST_BUCKETS)))
        start, places = 0, self._flat.split(sizes)
        for bucket, end in enumerate(ends):
            self._buckets.append(self._flat[sum(sizes[:start]) : sum(sizes[:end])])
            self._slots |= {backwards[i]: (bucket, places[i]) for i in range(start, end)}
            start = end
        self._counts = [sum(bucket == b for bucket, _ in self._slots.values()) for b in range(len(ends))]

    def begin_passes(self) -> None:
        """Call it before a step's first backward pass, also where the step starts over for want of memory."""
        self._is_last = False

    def begin_last_pass(self) -> None:
        """Call it before a step's last backward pass: its gradients are sent as they come."""
        if self._slots:
            sent = len(self._works)  # by a pass that ran out of memory later; the gradients are the same
            self._is_last, self._missing = True, [0] * sent + self._counts[sent:]

    def finish(self) -> None:
        """Send what was not sent, wait, and give every parameter its summed gradient."""
        if not self._slots:
            return
        for parameter, (bucket, place) in self._slots.items():  # those without a gradient in the last pass
            if bucket >= len(self._works):
                place.zero_() if parameter.grad is None else place.copy_(parameter.grad.view(-1))
        self._send(len(self._buckets))
        for work in self._works:
            work.wait()
        for parameter, (_, place) in self._slots.items():
            parameter.grad = place.view_as(parameter).to(parameter.dtype)
        self._works = []

    def _take(self, parameter: torch.nn.Parameter) -> None:
        """A gradient is there."""
        if not self._is_last or parameter.grad is None:
            return
        bucket, place = self._slots[parameter]
        if bucket < len(self._works):
            return
        place.copy_(parameter.grad.view(-1))
        self._missing[bucket] -= 1
        ready = next((b for b, count in enumerate(self._missing) if count > 0), len(self._missing))
        self._send(ready)

    def _send(self, count: int) -> None:
        """Send the first `count` buckets, as far as they were not."""
        for bucket in self._buckets[len(self._works) : count]:
            self._works.append(distributed.all_reduce(bucket, async_op=True))


def _cut_evenly(sizes: Sequence[int], least: int) -> list[int]:
    """The ends of buckets of at least `least` numbers each, but for the last."""
    ends, filled = [], 0
    for i, size in enumerate(sizes, 1):
        filled += size
        if filled >= least:
            ends.append(i)
            filled = 0
    if not ends or ends[-1] < len(sizes):
        ends.append(len(sizes))
    return ends
