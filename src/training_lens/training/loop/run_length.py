"""How long a run is, and which of its settings lie beyond its end: as in the Hugging Face Trainer, and told."""

from __future__ import annotations

import math
from collections.abc import Iterator

from training_lens.config.schema import TrainingSection
from training_lens.data.batching import Schedule


def count_warmup_steps(training: TrainingSection, total_steps: int) -> int:
    """Steps with rising learning rate: `warmup_steps`, or else ceil(warmup_ratio * total_steps)."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return math.ceil(training.warmup_ratio * total_steps)


def describe_run_length(training: TrainingSection, schedule: Schedule) -> Iterator[str]:
    """A sentence for each setting that does something else than its value alone would say."""
    total, in_epochs = schedule.total_steps, schedule.steps_in_epochs
    if training.max_steps and total != in_epochs:
        yield (
            f"training.max_steps: {total} steps, {total / schedule.steps_per_epoch:.3g} epochs; training.epochs="
            f"{training.epochs:g} would be {in_epochs} steps"
        )
    if training.eval_steps and training.eval_steps > total:
        yield f"training.eval_steps: {training.eval_steps} is beyond the run's {total} steps; it validates at its end"
    if training.save_steps and training.save_steps > total:
        yield f"training.save_steps: {training.save_steps} is beyond the run's {total} steps; it is saved at its end"
    warmup = count_warmup_steps(training, total)
    if warmup >= total and total > 1:
        peak = total / (warmup + 1)
        yield f"warm-up: {warmup} steps, the run has {total}; the learning rate rises to {peak:.0%} of training.lr"
    elif warmup > total / 2 and total > 2:
        yield f"warm-up: {warmup} of the run's {total} steps; the learning rate falls in the rest alone"
