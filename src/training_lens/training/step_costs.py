"""What steps cost in time and memory, from a few that were measured: an interval for all of a run's steps,
and the run's own estimate from its first ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from training_lens.data.batching import StepPlan, shard_positions, split_micro_batches
from training_lens.evaluation.evaluator import LossReport
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import counts_memory, peak_bytes, used_bytes
from training_lens.utils.formatting import format_seconds, format_size
from training_lens.utils.logging import get_logger
from training_lens.utils.processor_load import OtherPrograms

COUNTED_STEPS = 1000  # the tokens of longer runs are scaled up from this many steps
PEAK_MARGIN = 1.13  # for what comes later in a run: validation of all rows, checkpoints, captures
LEAST_ERROR = 0.2  # relative: runs took 0.90 to 1.21 times as long as was estimated, benchmarks/results/estimates.json
BUSY_SHARE = 0.25  # of the processor: other programs that use more may halve or double a run's speed
BUSY_FACTOR = 2.5  # runs beside a busy process took 0.66 to 2.3 times as long as was estimated
STUDENT_95 = {1: 12.7, 2: 4.3, 3: 3.2, 4: 2.8, 5: 2.6, 6: 2.4, 7: 2.4}  # by degrees of freedom; above: 2
logger = get_logger(__name__)
WARM_UP, MEASURED = 1, 4  # steps


@dataclass(frozen=True)
class StepPace:
    """Seconds per token of measured steps, padding included, and the relative half-width of its 95 % interval.

    `others_share`: of the processor, what other programs used while it was measured.
    """

    seconds_per_token: float
    error: float
    steps: int
    others_share: float = 0.0

    def bounds(self, seconds: float) -> tuple[float, float]:
        """The interval of a duration that was computed with this pace, wider beside other programs."""
        low, high = seconds * max(0.0, 1 - self.error), seconds * (1 + self.error)
        if self.others_share <= BUSY_SHARE:
            return low, high
        return min(low, seconds / BUSY_FACTOR), max(high, seconds * BUSY_FACTOR)


def measure_pace(seconds: Sequence[float], tokens: Sequence[int], others_share: float = 0.0) -> StepPace:
    """The pace of steps, by the ratio estimator: all their seconds over all their tokens (Cochran 1977, section 6.4).

    The error comes from the spread of the steps around that ratio, and is at least 20 %.
    """
    time, count = np.array(seconds), np.array(tokens, dtype=float)
    pace = float(time.sum() / count.sum())
    if len(time) < 2:
        return StepPace(pace, 1.0, len(time), others_share)
    spread = float(np.square(time - pace * count).sum() / (len(time) - 1))
    error = STUDENT_95.get(len(time) - 1, 2.0) * math.sqrt(spread / len(time)) / float(time.mean())
    return StepPace(pace, max(LEAST_ERROR, error), len(time), others_share)


def extrapolate_pace(first: StepPace, second: StepPace, further: float) -> StepPace:
    """The pace at `first` + `further` x (`second` - `first`), with the errors of both; at least that of `first`."""
    pace = first.seconds_per_token + further * max(0.0, second.seconds_per_token - first.seconds_per_token)
    errors = (1 - further) * first.seconds_per_token * first.error, further * second.seconds_per_token * second.error
    share = max(first.others_share, second.others_share)
    return StepPace(pace, math.hypot(*errors) / pace, min(first.steps, second.steps), share)


def describe_others(share: float) -> str:
    """What other programs used while steps were measured, where it matters; else nothing."""
    return f"other programs used {share:.0%} of the processor meanwhile" if share > BUSY_SHARE else ""


def first_steps(plan: RunPlan) -> Sequence[StepPlan]:
    """At most the first `COUNTED_STEPS` steps of the run; their order is random, so they are a fair sample."""
    return list(islice(plan.schedule.iterate_steps(), COUNTED_STEPS))


def count_run_tokens(plan: RunPlan, is_packed: bool) -> float:
    """Tokens of all steps of the run, padding included."""
    steps = first_steps(plan)
    return sum(count_step_tokens(plan, step, is_packed) for step in steps) * plan.schedule.total_steps / len(steps)


def count_step_tokens(plan: RunPlan, step: StepPlan, is_packed: bool) -> int:
    """Tokens of a step's micro-batches, padding included: its time is nearly proportional to them."""
    return sum(micro_batch_sizes(plan, step, is_packed))


def micro_batch_sizes(plan: RunPlan, step: StepPlan, is_packed: bool) -> list[int]:
    """The tokens, padding included, of each micro-batch that this process makes of a step."""
    lengths, budget = plan.train.lengths, plan.micro_batch_tokens
    positions = shard_positions(step.examples, lengths, plan.processes.index, plan.processes.count)
    parts = [lengths[part] for part in split_micro_batches(positions, lengths, budget, is_packed)]
    return [int(part.sum()) if is_packed else len(part) * int(part.max()) for part in parts]


def count_validated_tokens(plan: RunPlan) -> int:
    """Tokens of all validations of the run, that of the base and those of the validation sample included."""
    if plan.validation is None:
        return 0
    tokens, sample = count_validations(plan) * int(plan.validation.lengths.sum()), plan.validation_sample
    if sample is not None:
        every, total = plan.config.training.eval_steps or plan.schedule.steps_per_epoch, plan.schedule.total_steps
        times = sum(step % every > 0 for step in range(sample.every, total, sample.every))
        tokens += times * int(plan.validation.lengths[sample.positions].sum())
    return tokens


def count_validations(plan: RunPlan) -> int:
    """The number of validations of the run, that of the base included."""
    every = plan.config.training.eval_steps or plan.schedule.steps_per_epoch
    due = plan.schedule.total_steps // every
    return 1 + due + (plan.schedule.total_steps % every > 0)


@dataclass(frozen=True)
class OwnEstimate:
    """What a run expected after its step `step`: seconds of all steps with their 95 % interval, and of validations.

    `peak_bytes`: the highest memory to come, by the largest micro-batch. `others_share`: see `StepPace`.
    """

    step: int
    seconds: float
    seconds_low: float
    seconds_high: float
    validation_seconds: float
    peak_bytes: int
    others_share: float

    def __str__(self) -> str:
        low, high = (format_seconds(s + self.validation_seconds) for s in (self.seconds_low, self.seconds_high))
        others = describe_others(self.others_share)
        size = format_size(self.peak_bytes)
        return f"about {low} to {high}, peak memory about {size}{others and f' ({others})'}"


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
        if len(self._seconds) == WARM_UP:
            self._others = OtherPrograms()
        if len(self._seconds) == WARM_UP + MEASURED < trainer.schedule.total_steps - self._first:
            self.estimate = self._estimate_run(trainer, report.step)
            logger.info("the run will take %s", self.estimate)

    def _estimate_run(self, trainer: Any, step: int) -> OwnEstimate:
        plan = replace(self._plan, micro_batch_tokens=trainer.micro_batch_tokens)
        is_packed, device = trainer.engine.can_pack, plan.processes.device
        seen = list(islice(plan.schedule.iterate_steps(after=self._first), WARM_UP + MEASURED))
        sizes = [micro_batch_sizes(plan, each, is_packed) for each in seen]
        others_share = self._others.share() if device.type == "cpu" else 0.0
        pace = measure_pace(self._seconds[WARM_UP:], [sum(parts) for parts in sizes[WARM_UP:]], others_share)
        all_sizes = [micro_batch_sizes(plan, each, is_packed) for each in first_steps(plan)]
        seconds = pace.seconds_per_token * sum(map(sum, all_sizes)) * plan.schedule.total_steps / len(all_sizes)
        growth = max(map(max, all_sizes)) / max(map(max, sizes))  # of the largest micro-batch, against those seen
        used = peak_bytes(device) if counts_memory(device) else used_bytes(device)  # freed memory stays in the process
        passes = (used - self._used) * growth
        peak = round(PEAK_MARGIN * max(peak_bytes(device), self._used + passes))
        rows = 1 if plan.validation is None else int(plan.validation.lengths.sum())
        validations = count_validated_tokens(plan) / rows
        validation = self._validation * validations
        return OwnEstimate(step, seconds, *pace.bounds(seconds), validation, peak, pace.others_share)
