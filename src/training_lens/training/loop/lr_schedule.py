"""The learning rate of each step, its warm-up, and settings that reach beyond the run's end."""

from __future__ import annotations

import math
from collections.abc import Iterator

from training_lens.config.schema import TrainingSection
from training_lens.data.batching import Schedule


def default_lr(width: int) -> float:
    """A peak learning rate for LoRA from the model's hidden width, to two digits: 5e-5 * 10 * (2000 / width)^0.781.

    Source: the fit over Llama models that Thinking Machines published with "LoRA Without Regret" (2025): LoRA's best
    rate is ten times that of full fine-tuning and falls with width. Below about 1,000 it is extrapolated.

    Example:
        >>> default_lr(4096), default_lr(192)
        (0.00029, 0.0031)
    """
    return float(f"{5e-5 * 10 * (2000 / width) ** 0.781:.1e}")


def lr_at(step: int, total_steps: int, training: TrainingSection) -> float:
    """The learning rate of step `step`, counted from 1.

    It rises linearly to `training.lr` during the warm-up, and its first step is above zero. Then it stays constant, or
    falls to min_lr_ratio * lr, which it would reach one step after the last: linearly, as half a cosine, or as
    `scheduler_cycles` half cosines of equal length that start at the peak (arXiv 1608.03983, without growing cycles).
    """
    assert training.lr is not None
    warmup = count_warmup_steps(training, total_steps)
    if step <= warmup:
        return training.lr * step / (warmup + 1)
    if training.scheduler == "constant":
        return training.lr
    done, steps = step - 1 - warmup, total_steps - warmup
    if training.scheduler == "linear":
        decay = 1 - done / steps
    else:  # scheduler_cycles is 1 where the scheduler is cosine
        decay = 0.5 * (1 + math.cos(math.pi * (done * training.scheduler_cycles % steps) / steps))
    return training.lr * (training.min_lr_ratio + (1 - training.min_lr_ratio) * decay)


def count_warmup_steps(training: TrainingSection, total_steps: int) -> int:
    """Warm-up steps: `warmup_steps` where it is set, else ceil(warmup_ratio * total_steps)."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return math.ceil(training.warmup_ratio * total_steps)


def describe_run_length(training: TrainingSection, schedule: Schedule) -> Iterator[str]:
    """A sentence for each setting that reaches beyond the run's end, or that another setting overrides."""
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
        yield f"warm-up: {warmup} of the run's {total} steps; the learning rate falls only in the rest"
