"""What training computes by kernels in C; `library.can_compute` says where they work."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training_lens.models.fast.native.library import define_call, run_kernel, sum_dtype

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # `enum activation` of kernels.c


NormCall = define_call("norm", "x weight y scale", "width has_wide_weight", "epsilon")
NormBackCall = define_call("norm_back", "dy x weight scale dx", "width has_wide_weight")
GateCall = define_call("gate", "gate_up y", "width activation")
GateBackCall = define_call("gate_back", "dy gate_up dgate_up", "width activation")
RotateCall = define_call("rotate", "x cosine sine y", "heads size rotated x_stride y_stride interleaved", "direction")
DropCall = define_call("drop", "x draws columns y", "width least", "scale")
NLLCall = define_call("nll", "logits targets losses", "classes")


def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float
) -> tuple[Float[Tensor, "*tokens width"], Float[Tensor, "*tokens 1"]]:
    """y = w x / sqrt(mean(x^2) + eps), and the factor of each token, in the dtype of sums."""
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=sum_dtype(x))
    width, has_wide_weight = x.shape[-1], weight.dtype != x.dtype
    call = NormCall(x=x, weight=weight, y=y, scale=scale, width=width, has_wide_weight=has_wide_weight, epsilon=eps)
    run_kernel(call, x.dtype, scale.numel(), width)
    return y, scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x; `scale` as `rms_norm` gave it."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, width, has_wide_weight = torch.empty_like(x), x.shape[-1], weight.dtype != x.dtype
    call = NormBackCall(dy=dy, x=x, weight=weight, scale=scale, dx=dx, width=width, has_wide_weight=has_wide_weight)
    run_kernel(call, x.dtype, scale.numel(), width)
    return dx


def apply_gate(gate_up: Float[Tensor, "*tokens twice"], activation: str) -> Float[Tensor, "*tokens width"]:
    """a(gate) * up, with an activation of `ACTIVATIONS`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    call = GateCall(gate_up=gate_up, y=y, width=width, activation=ACTIVATIONS[activation])
    run_kernel(call, y.dtype, y.numel() // width, width)
    return y


def apply_gate_backward(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    grad, width = torch.empty_like(gate_up), dy.shape[-1]
    call = GateBackCall(dy=dy, gate_up=gate_up, dgate_up=grad, width=width, activation=ACTIVATIONS[activation])
    run_kernel(call, dy.dtype, dy.numel() // width, width)
    return grad


def rotate_heads(
    x: Float[Tensor, "tokens heads width"],
    cos: Float[Tensor, "tokens turned"],
    sin: Float[Tensor, "tokens turned"],
    direction: float,
    y: Float[Tensor, "tokens heads width"],
    interleaved: bool = False,
) -> None:
    """Rotary positions of x, forth (1) or back (-1), into y; in both, a token's heads lie one behind the other."""
    heads, size = x.shape[1:]
    call = RotateCall(
        x=x, cosine=cos.contiguous(), sine=sin.contiguous(), y=y, heads=heads, size=size, rotated=cos.shape[-1],
        x_stride=x.stride(0), y_stride=y.stride(0), interleaved=interleaved, direction=direction,
    )  # fmt: skip
    run_kernel(call, x.dtype, len(x), heads * size)


def drop_columns(
    x: Float[Tensor, "*tokens width"],
    draws: Int[Tensor, "tokens 2"],
    columns: Int[Tensor, " width"],
    least: int,
    scale: float,
) -> Float[Tensor, "*tokens width"]:
    """scale x where factor column + summand (int32, wrapping around) is at least `least`, else 0."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    call = DropCall(x=x, draws=draws.contiguous(), columns=columns, y=y, width=width, least=least, scale=scale)
    run_kernel(call, x.dtype, len(draws), width)
    return y


def write_nll_gradient(
    logits: Float[Tensor, "targets classes"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """-log softmax(logits)[target] of each row, in the dtype of sums; the logits become its gradient."""
    losses = logits.new_empty(len(logits), dtype=sum_dtype(logits))
    classes = logits.shape[1]
    call = NLLCall(logits=logits, targets=targets.contiguous(), losses=losses, classes=classes)
    run_kernel(call, logits.dtype, len(logits), classes)
    return losses
