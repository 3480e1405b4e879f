"""The arithmetic of training, fused: each function is one node of autograd, which keeps only what its gradient reads.

All take tensors of one dtype (float64 in the tests) on any device, and sum in float32 where the dtype is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu


def lora_linear(
    x: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, "out width"],
    bias: Float[Tensor, " out"] | None,
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    dropped: Float[Tensor, "*tokens width"] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """Frozen projections of one input with the low-rank branch of each: y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T.

    The rows of `weight` are those of all W_i, one below the other. The branch is added into the base product, and its
    input is shared; no gradient of W is formed. Kept for the backward pass: x and A x. Gradients, summed over tokens:
    dB = s dy^T (A x), dA = (s dy B)^T x, dx = dy W + (s dy B) A (arXiv 2106.09685, eq. 3).

    Args:
        factors: A_i (rank, width) and B_i (out_i, rank) of each, of any floating dtype; cast to that of `x` here.
        scales: s_i of each.
        dropped: what the branch sees in place of x, under dropout.
    """
    flat = x.reshape(-1, x.shape[-1])
    seen = None if dropped is None else dropped.reshape(flat.shape)
    parts = [part for pair in factors for part in pair]
    y: Tensor = _LoRALinear.apply(flat, seen, weight, bias, tuple(scales), *parts)
    return y.view(*x.shape[:-1], -1)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, scales: Any, *factors: Tensor
    ) -> Tensor:
        downs, ups = factors[::2], factors[1::2]
        down = torch.cat(downs).to(x.dtype)  # (ranks, width)
        up = _block_diagonal(ups, scales, x.dtype)  # (out, ranks)
        given = x if dropped is None else dropped
        low = given @ down.T  # (tokens, ranks)
        y = linear(x, weight, bias)
        y.addmm_(low, up.T)
        ctx.save_for_backward(given, weight, down, up, low)
        ctx.scales, ctx.shapes = scales, [up.shape for up in ups]
        ctx.dtypes, ctx.dropped = [factor.dtype for factor in factors], dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        given, weight, down, up, low = ctx.saved_tensors
        dlow = dy @ up  # (tokens, ranks)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dropped = dlow @ down if ctx.dropped else None
        if dx is not None and dropped is None:
            dx.addmm_(dlow, down)
        downs = (dlow.T @ given).split([rank for _, rank in ctx.shapes])
        ups = _blocks(dy.T @ low, ctx.shapes)
        pairs = zip(downs, (up * scale for up, scale in zip(ups, ctx.scales, strict=True)), strict=True)
        grads = [grad for pair in pairs for grad in pair]
        return (
            dx, dropped, None, None, None,
            *(g.to(d) if n else None for g, d, n in zip(grads, ctx.dtypes, ctx.needs_input_grad[5:], strict=True)),
        )  # fmt: skip


def _block_diagonal(ups: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """s_i B_i along the diagonal, (out, ranks)."""
    if len(ups) == 1:
        return (ups[0] * scales[0]).to(dtype)
    joined = ups[0].new_zeros([sum(sizes) for sizes in zip(*(up.shape for up in ups), strict=True)], dtype=dtype)
    for block, up, scale in zip(_blocks(joined, [(len(up), up.shape[1]) for up in ups]), ups, scales, strict=True):
        torch.mul(up, scale, out=block) if up.dtype == dtype else block.copy_(up * scale)
    return joined


def _blocks(joined: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The blocks of these shapes along the diagonal, as views."""
    rows = pairwise(accumulate((out for out, _ in shapes), initial=0))
    columns = pairwise(accumulate((rank for _, rank in shapes), initial=0))
    return [joined[a:b, c:d] for (a, b), (c, d) in zip(rows, columns, strict=True)]


def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*tokens width"]:
    """Root-mean-square norm, y = w x / sqrt(mean(x^2) + eps) (arXiv 1910.07467), for a frozen weight.

    The quotient is rounded to x's dtype before the weight, as transformers does. Kept: x, and a float for each token.
    Gradient: dx = (g - n mean(g n)) / rms, with g = w dy and n the quotient.
    """
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        sums = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_summing(x))  # one pass, no wider copy
        scale = sums.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (*tokens, 1)
        ctx.save_for_backward(x, weight, scale)
        return _scaled(x, scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        g = dy * weight
        along = torch.linalg.vecdot(g.to(scale.dtype), x.to(scale.dtype)).unsqueeze(-1)  # sum(g x)
        along.mul_(scale.square()).div_(-x.shape[-1])
        return _scaled(g.addcmul_(x, along.to(x.dtype)), scale), None, None


def _summing(x: Tensor) -> torch.dtype:
    """The dtype that sums over x are made in."""
    return torch.promote_types(x.dtype, torch.float32)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x times a wider number for each token, rounded once."""
    return torch.mul(x, scale, out=torch.empty_like(x))


def gated_silu(gate_up: Float[Tensor, "*tokens twice"]) -> Float[Tensor, "*tokens width"]:
    """silu(gate) * up of a joined projection whose first half is the gate (SwiGLU, arXiv 2002.05202).

    Kept: the projection alone; silu(gate) is computed again for the gradient.
    """
    y: Tensor = _GatedSilu.apply(gate_up)
    return y


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad = torch.empty_like(gate_up)
        dgate, dup = grad.chunk(2, -1)
        torch.mul(dy, silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return grad


def rotate(
    x: Float[Tensor, "tokens heads width"],
    cos: Float[Tensor, "tokens turned"],
    sin: Float[Tensor, "tokens turned"],
) -> Float[Tensor, "tokens heads width"]:
    """Rotary positions (arXiv 2104.09864) by halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        cos: of each token's angles; both halves hold the same, of which the first is read. `turned` of the `width`
            numbers of a head are turned, and the others left.
    """
    y: Tensor = _Rotate.apply(x, cos, sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(dy, cos, sin, -1.0), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float, out: Tensor | None = None) -> Tensor:
    """`rotate` without autograd, forth or (`direction` -1) back, into `out` where that is given."""
    half = cos.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    y = torch.empty_like(x) if out is None else out
    (x1, x2), (y1, y2) = (t[..., : 2 * half].chunk(2, -1) for t in (x, y))
    torch.mul(x1, c, out=y1).addcmul_(x2, s, value=-direction)
    torch.mul(x2, c, out=y2).addcmul_(x1, s, value=direction)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y
