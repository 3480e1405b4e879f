"""A run's estimate of its own duration and memory, from its first steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from training_lens.evaluation.evaluator import LossReport
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.plan import RunPlan
from training_lens.training.step_costs import (
    PEAK_MARGIN,
    count_validated_tokens,
    first_steps,
    measure_pace,
    micro_batch_sizes,
)
from training_lens.utils.devices import counts_memory, peak_bytes, used_bytes
from training_lens.utils.formatting import format_seconds, format_size
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
WARM_UP, MEASURED = 1, 4  # steps


@dataclass(frozen=True)
class OwnEstimate:
    """What a run expected after its step `step`: seconds of all steps with their 95 % interval, and of validations.

    `peak_bytes`: the highest memory to come, by the largest micro-batch.
    """

    step: int
    seconds: float
    seconds_low: float
    seconds_high: float
    validation_seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        low, high = (format_seconds(s + self.validation_seconds) for s in (self.seconds_low, self.seconds_high))
        return f"about {low} to {high}, peak memory about {format_size(self.peak_bytes)}"


class EstimateCallback(Callback):
    """Says once, after the fifth step that it sees, how long the run takes and how much memory.

    The first step warms up and is left out. Validations are expected to take as long as that of the base.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._seconds: list[float] = []
        self._validation = 0.0
        self.estimate: OwnEstimate | None = None

    def on_train_start(self, trainer: Any) -> None:
        self._first, self._started = trainer.state.step, time.perf_counter()
        self._used = used_bytes(trainer.processes.device)

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        if base:
            self._validation = time.perf_counter() - self._started

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        if self.estimate is not None:
            return
        self._seconds.append(report.seconds)
        if len(self._seconds) == WARM_UP + MEASURED < trainer.schedule.total_steps - self._first:
            self.estimate = self._estimate_run(trainer, report.step)
            logger.info("the run will take %s", self.estimate)

    def _estimate_run(self, trainer: Any, step: int) -> OwnEstimate:
        plan = replace(self._plan, micro_batch_tokens=trainer.micro_batch_tokens)
        is_packed, device = trainer.engine.can_pack, plan.processes.device
        seen = list(islice(plan.schedule.iterate_steps(after=self._first), WARM_UP + MEASURED))
        sizes = [micro_batch_sizes(plan, each, is_packed) for each in seen]
        pace = measure_pace(self._seconds[WARM_UP:], [sum(parts) for parts in sizes[WARM_UP:]])
        all_sizes = [micro_batch_sizes(plan, each, is_packed) for each in first_steps(plan)]
        seconds = pace.seconds_per_token * sum(map(sum, all_sizes)) * plan.schedule.total_steps / len(all_sizes)
        growth = max(map(max, all_sizes)) / max(map(max, sizes))  # of the largest micro-batch, against those seen
        used = peak_bytes(device) if counts_memory(device) else used_bytes(device)  # freed memory stays in the process
        passes = (used - self._used) * growth
        peak = round(PEAK_MARGIN * max(peak_bytes(device), self._used + passes))
        rows = 1 if plan.validation is None else int(plan.validation.lengths.sum())
        validations = count_validated_tokens(plan) / rows
        return OwnEstimate(step, seconds, *pace.bounds(seconds), self._validation * validations, peak)
