"""The lens as a callback of the HF Trainer and of trainers built on it.

The Trainer's order is clip, on_pre_optimizer_step, step, zero_grad, on_step_end: a callback sees clipped gradients
only. So hooks on the parameters copy the gradients that the backward pass leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from training_lens.core.capture import RunFacts
from training_lens.core.gradient_hooks import GradientHooks, LossHook
from training_lens.core.modules import GradientGetter
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


class LensDriver(Protocol):
    """The part of `TrainingLensFramework` that a training loop calls."""

    def start(self, model: Any, optimizer: torch.optim.Optimizer | None, facts: RunFacts | None) -> None: ...

    def register_gradient_hooks(self, scaler: Any = None) -> GradientHooks: ...

    def capture_gradients(self, step: int, gradient_of: GradientGetter) -> None: ...

    def record_step(self, step: int, values: Mapping[str, float | Tensor | None]) -> None: ...

    def record_evaluation(self, step: int, loss: float) -> None: ...

    def stop(self, *, failed: bool = False) -> None: ...


def build_trainer_callback(lens: LensDriver) -> Any:
    """See `TrainingLensFramework.trainer_callback`."""
    from transformers import TrainerCallback

    class TrainerLensCallback(TrainerCallback):
        """Drives a lens from the HF Trainer's events. With several processes the first one captures."""

        session: _TrainerSession | None = None  # None before training begins, and in all processes but the first

        def on_train_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
            if self.session:
                self.session.end_training(failed=True)  # the last training failed: the Trainer has no event for that
            self.session = _TrainerSession(lens, args, state, **event) if state.is_world_process_zero else None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **event: Any) -> None:
            if self.session:
                self.session.capture_gradients(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
            if self.session:
                self.session.record_step(state)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **event: Any) -> None:
            if self.session and metrics and "eval_loss" in metrics:
                lens.record_evaluation(state.global_step, float(metrics["eval_loss"]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **event: Any) -> None:
            if self.session and "train_loss" in (logs or {}):
                self.session.end_training()  # the last event before load_best_model_at_end loads other weights

        def on_train_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
            if self.session:
                self.session.end_training()

    return TrainerLensCallback()


class _TrainerSession:
    """One training run of a Trainer: its hooks, and the values of the current step."""

    def __init__(self, lens: LensDriver, args: Any, state: Any, **event: Any) -> None:
        self._lens = lens
        model, optimizer = event["model"], event["optimizer"]
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        lens.start(model, self._optimizer, _read_run_facts(args, state, event.get("train_dataloader")))
        self._is_single = args.world_size == 1
        scaler = getattr(optimizer, "scaler", None)
        self._gradients = lens.register_gradient_hooks(scaler) if self._is_single else None
        self._losses = LossHook(model)
        self._values: dict[str, Tensor | float | None] = {}
        self._steps = self._known_losses = 0
        self._has_ended = False
        if not self._is_single:
            logger.warning(
                "the lens sees one of %d processes: gradients are captured after clipping. The loss of a step, the "
                "norm before clipping and the clipping factor are unknown.",
                args.world_size,
            )

    def capture_gradients(self, step: int) -> None:
        self._lens.capture_gradients(step, self._gradients or (lambda parameter: parameter.grad))
        lr = self._optimizer.param_groups[0]["lr"]
        self._values = {"lr": lr, **_measure_clipping(self._optimizer, self._gradients)}

    def record_step(self, state: Any) -> None:
        if self._gradients:
            self._gradients.clear()
        loss = self._losses.take_loss() if self._is_single else None  # other processes have other examples
        self._steps, self._known_losses = self._steps + 1, self._known_losses + (loss is not None)
        targets = self._losses.supervised_tokens if self._is_single else None
        values = {"loss": loss, "epoch": state.epoch, "supervised_tokens": targets, **self._values}
        self._lens.record_step(state.global_step, values)

    def end_training(self, *, failed: bool = False) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self._gradients:
            self._gradients.remove()
        self._losses.remove()
        self._lens.stop(failed=failed)
        if self._is_single and self._steps and not self._known_losses:
            logger.warning("the lens saw no training loss: this trainer computes one that the model does not return.")


def _read_run_facts(args: Any, state: Any, batches: Any) -> RunFacts:
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


def _measure_clipping(optimizer: Any, hooks: GradientHooks | None) -> dict[str, Tensor]:
    """The norm of all gradients before clipping, and the factor that clipping applied. Does not synchronise.

    The factor comes from the gradients that the hooks copied; clipping multiplies all others by the same factor.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    copies = {id(p): gradient for p in parameters if hooks is not None and (gradient := hooks(p)) is not None}
    if not copies:
        return {}
    before = _global_norm(list(copies.values()))
    clip = _global_norm([p.grad for p in parameters if id(p) in copies]) / before
    others = [p.grad for p in parameters if id(p) not in copies]
    return {"grad_norm": torch.hypot(before, _global_norm(others) / clip) if others else before, "clip": clip}


def _global_norm(tensors: list[Any]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm
