"""What the training loop needs to know of a run."""

from __future__ import annotations

from dataclasses import dataclass

from training_lens.config.schema import TrainingSection
from training_lens.data.batching import Schedule
from training_lens.data.token_dataset import TokenDataset
from training_lens.training.loop.validation_sample import ValidationSample
from training_lens.utils.devices import Precision
from training_lens.utils.processes import Processes


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
