"""What steps cost in time and memory, from a few that were measured: an interval for all of a run's steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from training_lens.data.batching import StepPlan, shard_positions, split_micro_batches
from training_lens.training.plan import RunPlan

COUNTED_STEPS = 1000  # the tokens of longer runs are scaled up from this many steps
PEAK_MARGIN = 1.1  # for what comes later in a run: validation of all rows, checkpoints, captures, sampled answers
LEAST_ERROR = 0.2  # relative: runs took 0.90 to 1.21 times as long as was estimated, benchmarks/results/estimates.json
STUDENT_95 = {1: 12.7, 2: 4.3, 3: 3.2, 4: 2.8, 5: 2.6, 6: 2.4, 7: 2.4}  # by degrees of freedom; above: 2


@dataclass(frozen=True)
class StepPace:
    """Seconds per token of measured steps, padding included, and the relative half-width of its 95 % interval."""

    seconds_per_token: float
    error: float
    steps: int

    def bounds(self, seconds: float) -> tuple[float, float]:
        """The interval of a duration that was computed with this pace."""
        return seconds * max(0.0, 1 - self.error), seconds * (1 + self.error)


def measure_pace(seconds: Sequence[float], tokens: Sequence[int]) -> StepPace:
    """The pace of steps, by the ratio estimator: all their seconds over all their tokens (Cochran 1977, section 6.4).

    The error comes from the spread of the steps around that ratio, and is at least 20 %.
    """
    time, count = np.array(seconds), np.array(tokens, dtype=float)
    pace = float(time.sum() / count.sum())
    if len(time) < 2:
        return StepPace(pace, 1.0, len(time))
    spread = float(np.square(time - pace * count).sum() / (len(time) - 1))
    error = STUDENT_95.get(len(time) - 1, 2.0) * math.sqrt(spread / len(time)) / float(time.mean())
    return StepPace(pace, max(LEAST_ERROR, error), len(time))


def extrapolate_pace(first: StepPace, second: StepPace, further: float) -> StepPace:
    """The pace at `first` + `further` x (`second` - `first`), with the errors of both; at least that of `first`."""
    pace = first.seconds_per_token + further * max(0.0, second.seconds_per_token - first.seconds_per_token)
    errors = (1 - further) * first.seconds_per_token * first.error, further * second.seconds_per_token * second.error
    return StepPace(pace, math.hypot(*errors) / pace, min(first.steps, second.steps))


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
