"""The lens as a callback of the HF Trainer and of trainers built on it.

There the order is clip, on_pre_optimizer_step, step, zero_grad, on_step_end: gradients are clipped when a callback
first sees them. So they are kept by hooks on the parameters, as the last micro-batch's backward pass leaves them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training_lens.core.capture import RunFacts
from training_lens.core.gradient_hooks import GradientTap, LossTap
from training_lens.utils.logging import get_logger

if TYPE_CHECKING:
    from training_lens.core.framework import TrainingLensFramework

logger = get_logger(__name__)


def trainer_callback(lens: TrainingLensFramework) -> Any:
    """See `TrainingLensFramework.trainer_callback`."""
    from transformers import TrainerCallback

    class LensCallback(TrainerCallback):
        """Drives a lens from the HF Trainer's events. With several processes the first one captures."""

        joint: _Joint | None = None  # before training begins, and in all processes but the first

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.joint:
                self.joint.end(failed=True)  # that training broke off: the Trainer says so to no callback
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

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            if self.joint and "train_loss" in (logs or {}):
                self.joint.end()  # the last event before load_best_model_at_end puts other weights in

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
        self._single = args.world_size == 1
        self._tap = lens.tap(getattr(optimizer, "scaler", None)) if self._single else None
        self._losses = LossTap(model)
        self._values: dict[str, Tensor | float | None] = {}
        self._steps = self._known_losses = 0
        self._ended = False
        if not self._single:
            logger.warning(
                "the lens sees one of %d processes: gradients are captured after clipping, and the loss of a step, the "
                "norm before clipping and the share that clipping left are not known.",
                args.world_size,
            )

    def before_update(self, step: int) -> None:
        of = self._tap or (lambda parameter: parameter.grad)
        self._lens.gradients(step, of)
        self._values = {"lr": self._optimizer.param_groups[0]["lr"], **(_clipping(self._optimizer, self._tap))}

    def after_step(self, state: Any) -> None:
        if self._tap:
            self._tap.clear()
        loss = self._losses.take() if self._single else None  # another process has other examples
        self._steps, self._known_losses = self._steps + 1, self._known_losses + (loss is not None)
        self._lens.record(state.global_step, {"loss": loss, "epoch": state.epoch, **self._values})

    def end(self, *, failed: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        if self._tap:
            self._tap.remove()
        self._losses.remove()
        self._lens.stop(failed=failed)
        if self._single and self._steps and not self._known_losses:
            logger.warning("the lens saw no training loss: this trainer makes one that the model does not return.")


def _facts(args: Any, state: Any, batches: Any) -> RunFacts:
    steps = None
    if batches is not None and hasattr(batches, "__len__"):
        steps = max(1, math.ceil(len(batches) / args.gradient_accumulation_steps))
    return RunFacts(
        origin="transformers",
        after_step=state.global_step,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        settings={
            "total_steps": state.max_steps,
            "steps_per_epoch": steps,
            "max_grad_norm": args.max_grad_norm or None,
            "lr": args.learning_rate,
            "processes": args.world_size,
        },
    )


def _clipping(optimizer: Any, tap: GradientTap | None) -> dict[str, Tensor]:
    """The norm of all gradients before clipping, and what they were multiplied by. No synchronisation.

    The factor is told by what the tap watches; clipping has multiplied all others by it, too.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    kept = {id(p): gradient for p in parameters if tap is not None and (gradient := tap(p)) is not None}
    if not kept:
        return {}
    before = _norm(list(kept.values()))
    clip = _norm([p.grad for p in parameters if id(p) in kept]) / before
    others = [p.grad for p in parameters if id(p) not in kept]
    return {"grad_norm": torch.hypot(before, _norm(others) / clip) if others else before, "clip": clip}


def _norm(tensors: list[Any]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm
