"""What the training loop needs to know of a run; a sample of its validation rows, at a bounded cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from training_lens.config.schema import TrainingSection
from training_lens.data.batching import Schedule
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import LossReport
from training_lens.utils.devices import Precision
from training_lens.utils.processes import Processes

LEAST_VALIDATIONS = 8  # of a run: fewer show no trend
LEAST_ROWS = 8
TOKEN_SHARE = 0.05  # of the run's training tokens: all validations of the sample together. They need no backward pass


@dataclass(frozen=True)
class ValidationSample:
    """The validation rows at `positions`, ascending, are validated every `every` steps."""

    every: int
    positions: np.ndarray

    def add_loss(self, report: LossReport, supervised_counts: np.ndarray) -> LossReport:
        """A report of all rows, with the loss of these: their curve then has its points, too."""
        if report.row_nll is None:
            return report
        nll, targets = (values[self.positions].sum() for values in (report.row_nll, supervised_counts))
        return replace(report, sample_loss=float(nll / targets))


def draw_validation_sample(lengths: np.ndarray, schedule: Schedule, example_tokens: float) -> ValidationSample | None:
    """The sample that gives a run eight validations, those of all rows at epoch ends included, where they fit.

    The same for the same data and seed, whatever the machine: it depends on token counts alone. None if epochs alone
    give as many, or if even one validation of eight rows takes more than the share.

    Args:
        lengths: (rows,) tokens of the validation rows.
        example_tokens: mean tokens of a training example.
    """
    total, per_epoch = schedule.total_steps, schedule.steps_per_epoch
    epochs = total / per_epoch
    allowed = TOKEN_SHARE * epochs * schedule.epoch_examples * example_tokens
    drawn = np.random.Generator(np.random.PCG64([schedule.seed, 2**33])).permutation(len(lengths))
    tokens = np.cumsum(lengths[drawn])
    least = min(LEAST_ROWS, len(drawn))
    every = max(1, total // LEAST_VALIDATIONS, int(np.ceil(total * tokens[least - 1] / allowed)))
    more = sum(1 for step in range(every, total, every) if step % per_epoch)
    if epochs >= LEAST_VALIDATIONS or not more:
        return None
    rows = max(least, int(np.searchsorted(tokens, allowed / more, side="right")))
    return ValidationSample(every, np.sort(drawn[:rows]))


@dataclass(frozen=True)
class LoopPlan:
    """What the loop trains on, and how.

    Args:
        dataset: tokenized training examples; `validation` likewise, or None.
        schedule: which examples each step takes.
        settings: the config's training section, with `lr` resolved.
        precision: of the forward and backward pass.
        micro_batch_tokens: most tokens in one forward pass, unless a pass on CUDA measures another number.
        pad_id: a token id to pad with; the model never sees it.
        lora_plus_ratio: learning rate of LoRA's B over that of all else; None: the same.
        validation_sample: validation rows that are validated more often than all of them; None: no such ones.
    """

    dataset: TokenDataset
    validation: TokenDataset | None
    schedule: Schedule
    settings: TrainingSection
    precision: Precision
    processes: Processes
    micro_batch_tokens: int
    pad_id: int
    lora_plus_ratio: float | None = None
    validation_sample: ValidationSample | None = None
