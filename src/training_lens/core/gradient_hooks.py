"""Hooks on a loop that is not ours: gradients before anything clips them, and the raw loss. They only fetch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class GradientTap:
    """Keeps each parameter's gradient as the last backward pass left it: accumulated, not yet clipped.

    Which micro-batch of a step is the last that reaches a parameter is not known before (an expert may get no token
    in the last one), so each is copied. Cost: memory of the adapter's gradients, and a copy of them a micro-batch.

    Args:
        scale: what the gradients are multiplied by at that time (a GradScaler's `get_scale`); 1 without one.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], scale: Any = None) -> None:
        self._kept: dict[int, Tensor] = {}
        self._scale = scale
        self._divisor: float | None = None
        self._handles = [p.register_post_accumulate_grad_hook(self._keep) for p in parameters if p.requires_grad]

    def __call__(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The gradient, unscaled; None where the step gave it none."""
        kept = self._kept.get(id(parameter))
        if kept is None or self._scale is None:
            return kept
        if self._divisor is None:
            self._divisor = self._scale()  # waits for the device, so once a step
        return kept / self._divisor

    def clear(self) -> None:
        """The step is over."""
        self._kept.clear()
        self._divisor = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def _keep(self, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is None:
            return
        if id(parameter) in self._kept:
            self._kept[id(parameter)].copy_(parameter.grad)
        else:
            self._kept[id(parameter)] = parameter.grad.detach().clone()


class LossTap:
    """The raw loss of a step, read from what the model's forward passes return while it trains.

    The HF Trainer's log replaces a loss that is not finite and averages over steps; this one does neither. A loss that
    was divided by the step's tokens (`num_items_in_batch`) is summed over micro-batches, another averaged. TRL's
    trainers take log-probabilities: they are summed and divided by the number of labels.

    Only what training goes back through counts, and log-probabilities only where all labels weigh the same. So of a
    trainer with a loss of its own (DPO, label smoothing) nothing is given, rather than another loss. Cost: waits for
    the device once, in the first backward pass through log-probabilities.
    """

    def __init__(self, model: Any) -> None:
        self._handle = model.register_forward_hook(self._read, with_kwargs=True)
        self._weighed_alike: bool | None = None
        self._clear()

    def take(self) -> Tensor | None:
        """The loss since the last call; None where no backward pass went through one."""
        if self._passes == 0:
            return None
        loss = self._sum / (self._tokens if self._tokens is not None else 1 if self._summed else self._passes)
        self._clear()
        return loss

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _clear(self) -> None:
        self._sum, self._passes, self._summed = torch.zeros(()), 0, False
        self._tokens: Tensor | None = None

    def _read(self, module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        loss, log_probs = getattr(output, "loss", None), getattr(output, "log_probs", None)
        if log_probs is not None and log_probs.requires_grad:
            scores, labels = log_probs.detach(), output.label_mask.detach()
            log_probs.register_hook(lambda gradient: self._add_scores(gradient, scores, labels))
        elif loss is not None and loss.requires_grad:
            value, self._summed = loss.detach(), kwargs.get("num_items_in_batch") is not None
            loss.register_hook(lambda _: self._add(value))

    def _add_scores(self, gradient: Tensor, scores: Tensor, labels: Tensor) -> None:
        if self._weighed_alike is None:
            low = gradient.masked_fill(~labels, torch.inf).min()
            self._weighed_alike = not low < gradient.masked_fill(~labels, -torch.inf).max()
        if self._weighed_alike:
            tokens = labels.sum()
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
            self._add(-scores.sum())

    def _add(self, value: Tensor) -> None:
        self._sum = value if self._passes == 0 else self._sum + value
        self._passes += 1
