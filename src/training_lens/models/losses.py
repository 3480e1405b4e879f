"""The loss of training, for supervised positions only, in chunks of the vocabulary's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, pad

LOGITS_AT_ONCE = (
    7 * 2**20
)  # numbers in one chunk of logits: 28 MB in float32; from 32 MB on glibc keeps none for the next
ROWS = 64  # chunks are of a multiple of so many: a product of a new shape costs oneDNN as much again to prepare
Logits = Callable[[Tensor], Tensor]


def linear_nll(
    states: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " targets"],
) -> Float[Tensor, ""]:
    """Sum of -log softmax(states W^T + b)[target] in nats, float32, for a frozen output layer.

    The gradient is formed on the way: (softmax - onehot) W of each chunk. Kept for the backward pass: that alone, as
    large as `states`. Memory: one chunk of `LOGITS_AT_ONCE` logits, in the states' dtype and in float32.
    """
    total: Tensor = _LinearNll.apply(states, weight, bias, targets)
    return total


class _LinearNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        size = max(1, LOGITS_AT_ONCE // weight.shape[0] // ROWS) * ROWS
        grad, total = torch.empty_like(states), states.new_zeros((), dtype=_summing(states))
        for part, wanted, into in zip(states.split(size), targets.split(size), grad.split(size), strict=True):
            filled = pad(part, (0, 0, 0, -len(part) % ROWS))
            logits = linear(filled, weight, bias)[: len(part)].to(total.dtype)  # (part, vocabulary)
            p = logits.softmax(-1)
            largest, at = p.max(-1, keepdim=True)  # at least 1 / vocabulary, so its logarithm is exact
            normalizer = logits.gather(1, at) - largest.log()  # log sum exp; torch's own takes ten times as long
            total += (normalizer - logits.gather(1, wanted[:, None])).sum()
            p[torch.arange(len(wanted), device=p.device), wanted] -= 1
            into.copy_((pad(p.to(states.dtype), (0, 0, 0, len(filled) - len(part))) @ weight)[: len(part)])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * dtotal.to(grad.dtype), None, None, None


def nll(states: Float[Tensor, "targets hidden"], logits: Logits, targets: Int[Tensor, " targets"]) -> Float[Tensor, ""]:
    """`linear_nll` for any frozen way from states to (targets, vocabulary) logits: scaled, capped, several layers."""
    total: Tensor = _Nll.apply(states, logits, targets)
    return total


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, logits: Logits, targets: Tensor) -> Tensor:
        vocabulary = logits(states[:1].detach()).shape[-1]
        size = max(1, LOGITS_AT_ONCE // vocabulary)
        grad, total = torch.empty_like(states), states.new_zeros((), dtype=_summing(states))
        for part, wanted, into in zip(states.split(size), targets.split(size), grad.split(size), strict=True):
            with torch.enable_grad():
                alone = part.detach().requires_grad_()
                loss = cross_entropy(logits(alone).to(total.dtype), wanted, reduction="sum")
            into.copy_(torch.autograd.grad(loss, alone)[0])
            total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * dtotal.to(grad.dtype), None, None


def _summing(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
