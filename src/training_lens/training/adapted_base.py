"""The base with its adapter, and the loop around it, as a plan says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training_lens.models.adapters import attach
from training_lens.models.factory import checkpoint_gradients
from training_lens.models.model_classes import has_own_kernels
from training_lens.models.sharding import shard_base
from training_lens.models.unsloth_backend import fuse_adapter
from training_lens.training.loop.callbacks import Callback
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import diverge_rng, seed_everything


def build_trainer(
    plan: RunPlan, model: Any, checkpoints: CheckpointManager, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """The plan's loop around `model`, the base."""
    return Trainer(adapt_base(plan, model), plan.loop_plan, checkpoints, callbacks)


def adapt_base(plan: RunPlan, model: Any) -> Any:
    """The base with its adapter, initialized from the seed; shared out over the processes if configured."""
    config, processes = plan.config, plan.processes
    seed_everything(config.training.seed)
    adapted = attach(model, config.peft, plan.new_ids)
    diverge_rng(processes.index)  # for draws that no token decides, after the same initialization
    if has_own_kernels(model):
        adapted = fuse_adapter(adapted, config)
    elif config.training.gradient_checkpointing:
        checkpoint_gradients(adapted)
    if processes.is_base_sharded:
        shard_base(adapted, processes.device, config.distributed.cpu_offload)
    return adapted
