"""A planned run and a model to its loop: adapter, gradient checkpointing, trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from training_lens.config.schema import TrainingConfig
from training_lens.errors import OutOfMemoryError
from training_lens.models.adapters import attach
from training_lens.models.factory import checkpoint_gradients
from training_lens.training.loop.callbacks import Callback
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan
from training_lens.utils.formatting import said
from training_lens.utils.seeding import seed_everything
from training_lens.utils.shortage import is_out_of_memory


def build_trainer(plan: RunPlan, model: Any, checkpoints: CheckpointManager, callbacks: Sequence[Callback]) -> Trainer:
    """The loop of the plan around `model`, its base; the adapter's start comes from the seed."""
    config = plan.config
    seed_everything(config.training.seed)
    adapted = attach(model, config.peft)
    if config.training.gradient_checkpointing:
        checkpoint_gradients(adapted)
    return Trainer(
        adapted,
        plan.train,
        plan.validation,
        plan.schedule,
        config.training,
        plan.precision,
        plan.processes,
        plan.micro_batch_tokens,
        checkpoints,
        callbacks,
        fill_id=plan.tokenizer.eos_token_id,
        lora_plus_ratio=config.peft.lora_plus_ratio,
    )


@contextmanager
def memory_watched(config: TrainingConfig) -> Iterator[None]:
    """Within the block, memory that runs out is an `OutOfMemoryError` that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        budget = config.training.micro_batch_tokens
        ways = (
            [] if budget == "auto" else [f"lower training.micro_batch_tokens (now {budget}; never changes the result)"]
        )
        ways += [f"lower model.seq_len (now {config.model.seq_len})"]
        ways += [] if config.training.gradient_checkpointing else ["set training.gradient_checkpointing=true"]
        ways += [] if config.model.quantization == "4bit" else ["set model.quantization=4bit"]
        raise OutOfMemoryError(f"the run does not fit into memory: {said(error)} Do any: {'; '.join(ways)}.") from error
