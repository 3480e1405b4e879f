"""The lens as a callback of the HF Trainer and of trainers built on it.

There the order is clip, on_pre_optimizer_step, step, zero_grad, on_step_end: gradients are clipped when a callback
first sees them. So they are kept by hooks on the parameters, as the last micro-batch's backward pass leaves them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training_lens.core.capture import RunFacts
from training_lens.core.taps import GradientTap, LossTap
from training_lens.utils.logging import get_logger

if TYPE_CHECKING:
    from training_lens.core.framework import TrainingLensFramework

logger = get_logger(__name__)


def trainer_callback(lens: TrainingLensFramework) -> Any:
    """See `TrainingLensFramework.trainer_callback`."""
    from transformers import TrainerCallback

    class LensCallback(TrainerCallback):
        """Drives a lens from the HF Trainer's events. With several processes the first one captures."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.joint = _Joint(lens, args, state, **given) if state.is_world_process_zero else None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.joint:
                self.joint.before_update(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.joint:
                self.joint.after_step(state)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any) -> None:
            if self.joint and metrics and "eval_loss" in metrics:
                lens.evaluation(state.global_step, float(metrics["eval_loss"]))

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.joint:
                self.joint.end()

    return LensCallback()


class _Joint:
    """One training run of a Trainer: its hooks, and what a step leaves for its end."""

    def __init__(self, lens: TrainingLensFramework, args: Any, state: Any, **given: Any) -> None:
        self._lens = lens
        model, optimizer = given["model"], given["optimizer"]
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        lens.start(model, self._optimizer, _facts(args, state, given.get("train_dataloader")))
        self._single = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self._tap = lens.tap(getattr(optimizer, "scaler", None)) if self._single else None
        if not self._single:
            logger.info("several processes: the lens sees gradients after clipping")
        self._losses = LossTap(model)
        self._values: dict[str, Tensor | float | None] = {}

    def before_update(self, step: int) -> None:
        of = self._tap or (lambda parameter: parameter.grad)
        self._lens.gradients(step, of)
        self._values = {"lr": self._optimizer.param_groups[0]["lr"], **(_clipping(self._optimizer, self._tap))}

    def after_step(self, state: Any) -> None:
        if self._tap:
            self._tap.clear()
        values = {"loss": self._losses.take(), "epoch": state.epoch, **self._values}
        self._lens.record(state.global_step, values)

    def end(self) -> None:
        if self._tap:
            self._tap.remove()
        self._losses.remove()
        self._lens.stop()


def _facts(args: Any, state: Any, batches: Any) -> RunFacts:
    steps = None
    if batches is not None and hasattr(batches, "__len__"):
        steps = max(1, len(batches) // args.gradient_accumulation_steps)
    return RunFacts(
        origin="transformers",
        after_step=state.global_step,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        settings={
            "total_steps": state.max_steps,
            "steps_per_epoch": steps,
            "max_grad_norm": args.max_grad_norm or None,
            "lr": args.learning_rate,
        },
    )


def _clipping(optimizer: Any, tap: GradientTap | None) -> dict[str, Tensor]:
    """The norm of all gradients before clipping, and what they were multiplied by. No synchronisation."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    now = _norm([p.grad for p in parameters])
    if tap is None or any(tap(p) is None for p in parameters):
        return {}
    before = _norm([g for p in parameters if (g := tap(p)) is not None])
    return {"grad_norm": before, "clip": now / before}


def _norm(tensors: list[Any]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm
