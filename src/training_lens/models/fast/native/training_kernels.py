"""What training computes by kernels in C; `library.can_compute` says where they work."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training_lens.models.fast.native.library import call_kernel, sum_dtype

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # `enum activation` of kernels.c


def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float
) -> tuple[Float[Tensor, "*tokens width"], Float[Tensor, "*tokens 1"]]:
    """y = w x / sqrt(mean(x^2) + eps), and the factor of each token, in the dtype of sums."""
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=sum_dtype(x))
    width = x.shape[-1]
    call_kernel("norm", x.dtype, scale.numel(), (x, weight, y, scale), (width, weight.dtype != x.dtype), (eps,), width)
    return y, scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x; `scale` as `rms_norm` gave it."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, width = torch.empty_like(x), x.shape[-1]
    of = (width, weight.dtype != x.dtype)
    call_kernel("norm_back", x.dtype, scale.numel(), (dy, x, weight, scale, dx), of, size=width)
    return dx


def apply_gate(gate_up: Float[Tensor, "*tokens twice"], activation: str) -> Float[Tensor, "*tokens width"]:
    """a(gate) * up, with an activation of `ACTIVATIONS`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    call_kernel("gate", y.dtype, y.numel() // width, (gate_up, y), (width, ACTIVATIONS[activation]), size=width)
    return y


def apply_gate_backward(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    grad, width = torch.empty_like(gate_up), dy.shape[-1]
    of = (width, ACTIVATIONS[activation])
    call_kernel("gate_back", dy.dtype, dy.numel() // width, (dy, gate_up, grad), of, size=width)
    return grad


def rotate_heads(
    x: Float[Tensor, "tokens heads width"],
    cos: Float[Tensor, "tokens turned"],
    sin: Float[Tensor, "tokens turned"],
    direction: float,
    y: Float[Tensor, "tokens heads width"],
) -> None:
    """Rotary positions of x, forth (1) or back (-1), into y; in both, a token's heads lie one behind the other."""
    heads, width = x.shape[1:]
    cos, sin = cos.contiguous(), sin.contiguous()
    turned = cos.shape[-1]
    of = (heads, width, turned // 2, x.stride(0), y.stride(0), turned)
    call_kernel("rotate", x.dtype, len(x), (x, cos, sin, y), of, (direction,), heads * width)


def write_nll_gradient(
    logits: Float[Tensor, "targets classes"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """-log softmax(logits)[target] of each row, in the dtype of sums; the logits become its gradient."""
    losses = logits.new_empty(len(logits), dtype=sum_dtype(logits))
    classes = logits.shape[1]
    call_kernel("nll", logits.dtype, len(logits), (logits, targets.contiguous(), losses), (classes,), size=classes)
    return losses
