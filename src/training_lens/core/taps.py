"""Hooks on a loop that is not ours: gradients before anything clips them, and the raw loss. They only fetch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class GradientTap:
    """Keeps each parameter's gradient as the last backward pass left it: accumulated, not yet clipped.

    Where accelerate says that more micro-batches follow, nothing is copied. Cost: one copy of the adapter's gradients
    a step, in time and memory.

    Args:
        scale: what the gradients are multiplied by at that time (a GradScaler's `get_scale`); 1 without one.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], scale: Any = None) -> None:
        self._kept: dict[int, Tensor] = {}
        self._scale = scale
        self._handles = [p.register_post_accumulate_grad_hook(self._keep) for p in parameters if p.requires_grad]

    def __call__(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The gradient, unscaled; None where the step gave it none."""
        kept = self._kept.get(id(parameter))
        return kept if kept is None or self._scale is None else kept / self._scale()

    def clear(self) -> None:
        """The step is over."""
        self._kept.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def _keep(self, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is None or _more_to_come():
            return
        if id(parameter) in self._kept:
            self._kept[id(parameter)].copy_(parameter.grad)
        else:
            self._kept[id(parameter)] = parameter.grad.detach().clone()


def _more_to_come() -> bool:
    """Whether accelerate, if it drives the loop, is between the micro-batches of one step."""
    from accelerate.state import GradientState

    return not GradientState().sync_gradients


class LossTap:
    """The raw loss of a step, read from what the model's forward passes return while it trains. No synchronisation.

    The HF Trainer's log replaces a loss that is not finite and averages over steps; this one does neither. A loss that
    was divided by the step's tokens (`num_items_in_batch`) is summed over micro-batches, another averaged. TRL's
    SFTTrainer takes log-probabilities and makes the loss itself: they are summed and divided by the number of labels.
    """

    def __init__(self, model: Any) -> None:
        self._handle = model.register_forward_hook(self._read, with_kwargs=True)
        self._clear()

    def take(self) -> Tensor | None:
        """The loss since the last call; None where no forward pass gave one."""
        if self._passes == 0:
            return None
        loss = self._sum / (self._tokens if self._tokens is not None else 1 if self._summed else self._passes)
        self._clear()
        return loss

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _clear(self) -> None:
        self._sum, self._tokens, self._passes, self._summed = torch.zeros(()), None, 0, False

    def _read(self, module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        loss, log_probs = getattr(output, "loss", None), getattr(output, "log_probs", None)
        if log_probs is not None:
            tokens = output.label_mask.detach().sum()
            self._tokens = tokens if self._tokens is None else self._tokens + tokens
            self._add(-log_probs.sum())
        elif loss is not None:
            self._summed = kwargs.get("num_items_in_batch") is not None
            self._add(loss)

    def _add(self, value: Tensor) -> None:
        value = value.detach()
        self._sum = value if self._passes == 0 else self._sum + value
        self._passes += 1
