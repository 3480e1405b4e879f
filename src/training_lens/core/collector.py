"""What a collector is, and how often it looks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from training_lens.core.module_batches import Factors, Groups
from training_lens.core.modules import AdapterModule
from training_lens.core.probe import Probe
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.models.scoring import PairedScores


@dataclass
class Watched:
    """What collectors look at. They change nothing of it.

    `before`, `gradients` and `after` have one stack for each of `groups`: the weights that the step's gradients belong
    to, these gradients (accumulated, unscaled, before clipping), and the weights after the update. At the moment of
    gradients `after` is still empty; at the probe the model computes as after the update, and `scores` are those of its
    supervised tokens without and with the adapter. `one_pass`: the adapter adds nothing yet, so the probe goes through
    the model once, with the adapter on, and not twice.
    """

    model: Any
    modules: tuple[AdapterModule, ...]
    groups: Groups
    optimizer: torch.optim.Optimizer | None = None
    probe: Probe | None = None
    total_steps: int | None = None
    before: Sequence[Factors] = field(default_factory=tuple)
    gradients: Sequence[Factors] = field(default_factory=tuple)
    after: Sequence[Factors] = field(default_factory=tuple)
    scores: PairedScores | None = None
    one_pass: bool = False

    @property
    def names(self) -> list[str]:
        """Of the modules, in order: the rows of what is measured for each."""
        return [module.name for module in self.modules]


class DataCollector(ABC):
    """Captures one table. Override `collect`; say what, when and how often by the class attributes.

    A collector must change nothing that training reads: no parameter, no gradient, no random state of torch. It should
    return tensors as they are on the device (`.item()` and `.cpu()` wait for it). Its seconds go to the lens's cost.

    Example:
        @CollectorRegistry.register
        class Sparsity(DataCollector):
            name, data_type, moment = "sparsity", DataType.ADAPTER_GRADIENTS, Moment.GRADIENTS

            def collect(self, watched: Watched, step: int) -> Captured:
                zeros = [watched.groups.joined([(g.b == 0).float().mean((1, 2)) for g in watched.gradients])]
                return Captured({"zero_share": zeros[0]}, rows=watched.names)
    """

    name: ClassVar[str]
    data_type: ClassVar[DataType]
    moment: ClassVar[Moment] = Moment.UPDATE
    cadence: ClassVar[Cadence] = Cadence.SCALARS

    def start(self, watched: Watched) -> Captured | None:
        """Before the first step: what holds for the whole run goes down as step 0."""
        return None

    @abstractmethod
    def collect(self, watched: Watched, step: int) -> Captured | None:
        """What is seen at a step; None where there is nothing."""

    def watching(self, watched: Watched) -> AbstractContextManager[Any]:
        """Around the probe's forward passes (moment probe alone): for hooks on modules."""
        return nullcontext()


NICE = (1, 2, 5)


class Pace:
    """At which steps a kind of capture is due: at every `every`-th, or as often as `share` of the training time allows.

    Then the steps are multiples of 1, 2, 5, 10, 20, 50, ...: the smallest that keep the share, given what a capture
    took and what a step takes. So two runs share most of their steps. In a run whose length is known these are about
    `most` at most, and about `least` at least, whatever they cost. Step 1 is always due, but for what was seen at
    step 0.

    Args:
        most: None: any number.
        always: so many first steps are due whatever they cost, and the run's last.
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
        from_step: int = 1,
    ) -> None:
        self._fixed, self._share, self._first = every is not None, share, from_step
        self._always, self._last = (always, total_steps) if always and not self._fixed else (0, None)
        self._longest = nice(total_steps / least) if total_steps and least else None
        self._shortest = every if every is not None else nice((total_steps or 0) / (most or math.inf))
        self._seconds = self._cheaper = math.inf  # of the last capture, and of the cheaper of the last two
        self.interval = self._shortest

    def due(self, step: int) -> bool:
        if step == self._first or 0 < step <= self._always:
            return True
        return step > 0 and (step % self.interval == 0 or step == self._last)

    def took(self, seconds: float, step_seconds: float) -> None:
        """The last capture took so long, while steps take `step_seconds`; one that is dear for once changes nothing."""
        self._cheaper, self._seconds = min(seconds, self._seconds), seconds
        self.steps_take(step_seconds)

    def steps_take(self, seconds: float) -> None:
        """So long now: a run's first steps are slower than the others."""
        if not self._fixed and seconds > 0 and self._cheaper < math.inf:
            wanted = nice(self._cheaper / (self._share * seconds))
            self.interval = max(self._shortest, min(wanted, self._longest or wanted))


def nice(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not under `least`."""
    power = 1
    while True:
        for factor in NICE:
            if factor * power >= least:
                return factor * power
        power *= 10
