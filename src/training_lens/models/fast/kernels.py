"""The fused functions of training: each is one autograd node that keeps only what its gradient needs.

All take tensors of one dtype (float64 in the tests) on any device, and sum in float32 where the dtype is smaller. On a
CPU with a C compiler, everything but matrix products is one pass over memory (`native`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear, silu

from training_lens.models.fast.example_gradients import active_collection
from training_lens.models.fast.native import training_kernels as native
from training_lens.models.fast.native.library import are_heads_adjacent, can_compute, sum_dtype

SUMS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}  # numbers of W + s B A that exist at a time: 1 MB stays in a CPU's cache

_gelu_backward = torch.ops.aten.gelu_backward.grad_input
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Any]]] = {  # and what writes their gradient
    "silu": (silu, torch.ops.aten.silu_backward.grad_input),
    "gelu": (gelu, _gelu_backward),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh")),
}


def activation_name(activation: Any) -> str | None:
    """The name in `ACTIVATIONS` of the function that gives the same values; None where none does."""
    x = torch.linspace(-6, 6, 97)
    try:
        values = activation(x)
        same = (name for name, (known, _) in ACTIVATIONS.items() if torch.allclose(known(x), values, atol=1e-5))
        return next(same, None)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes more than a tensor, or gives another kind
        return None


def lora_linear(
    x: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, "out width"] | Callable[[], Tensor],
    bias: Float[Tensor, " out"] | None,
    factors: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[float],
    dropped: Float[Tensor, "*tokens width"] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """Frozen projections of one input with the low-rank branch of each: y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T.

    The rows of `weight` are those of all W_i, one below the other. The branch is added into the base product, and its
    input is shared; no gradient of W is formed. Kept for the backward pass: x and A x. Gradients, summed over tokens:
    dB = s dy^T (A x), dA = (s dy B)^T x, dx = dy W + (s dy B) A (arXiv 2106.09685, eq. 3). Within
    `ExampleGradients.collect` the sums over each example's tokens go there instead.

    Args:
        weight: or a function that forms it, called again for the backward pass.
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
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Any, bias: Tensor | None, scales: Any, *factors: Tensor
    ) -> Tensor:
        downs, ups = factors[::2], factors[1::2]
        down = torch.cat(downs).to(x.dtype)  # (ranks, width)
        scaled = [(up * scale).to(x.dtype) for up, scale in zip(ups, scales, strict=True)]
        given = x if dropped is None else dropped
        low = given @ down.T  # (tokens, ranks)
        y = linear(x, weight() if callable(weight) else weight, bias)
        outs, ranks = _branch_sizes(ups)
        for part, into, up in zip(low.split(ranks, 1), y.split(outs, 1), scaled, strict=True):
            into.addmm_(part, up.T)
        ctx.form_weight = weight if callable(weight) else None
        ctx.save_for_backward(given, None if ctx.form_weight else weight, down, low, *scaled)
        ctx.scales, ctx.dropped = scales, dropped is not None
        ctx.examples, ctx.factors = active_collection(), tuple(map(id, factors))
        ctx.dtypes = [factor.dtype for factor in factors]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        given, weight, down, low, *ups = ctx.saved_tensors
        outs, ranks = _branch_sizes(ups)
        dys = dy.split(outs, 1)
        dlow = torch.cat([part @ up for part, up in zip(dys, ups, strict=True)], 1)  # (tokens, ranks)
        dx = dy @ (weight if ctx.form_weight is None else ctx.form_weight()) if ctx.needs_input_grad[0] else None
        dropped = dlow @ down if ctx.dropped else None
        if dx is not None and dropped is None:
            dx.addmm_(dlow, down)
        if ctx.examples is not None:
            if ctx.examples.accept_input(len(dy)):
                for i, (start, end) in enumerate(ctx.examples.spans):
                    parts = (given[start:end], low[start:end], dlow[start:end], [part[start:end] for part in dys])
                    ctx.examples.add(i, ctx.factors, _factor_gradients(*parts, ctx.scales, ranks))
            return dx, dropped, None, None, None, *[None] * len(ctx.factors)
        found = _factor_gradients(given, low, dlow, dys, ctx.scales, ranks)
        grads = zip(found, ctx.dtypes, ctx.needs_input_grad[5:], strict=True)
        return dx, dropped, None, None, None, *(grad.to(dtype) if needed else None for grad, dtype, needed in grads)


def _factor_gradients(
    given: Tensor, low: Tensor, dlow: Tensor, dys: Sequence[Tensor], scales: Sequence[float], ranks: list[int]
) -> Iterator[Tensor]:
    """dA and dB of each branch in turn, summed over the tokens."""
    downs = (dlow.T @ given).split(ranks)
    for down, part, seen, scale in zip(downs, dys, low.split(ranks, 1), scales, strict=True):
        yield down
        yield (seen.T @ part).T.mul_(scale)  # in this order the product is faster


def _branch_sizes(ups: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Outputs and rank of each branch."""
    return [up.shape[0] for up in ups], [up.shape[1] for up in ups]


@torch.no_grad()
def row_norms(
    weight: Float[Tensor, "out width"], down: Float[Tensor, "rank width"], up: Float[Tensor, "out rank"], scale: float
) -> Float[Tensor, " out"]:
    """|W + s B A| of each row, the divisor of DoRA, in float32 or wider; no gradient (arXiv 2402.09353, section 4.3).

    The sum is formed in blocks of rows: as much arithmetic as W A^T, from which the norm's square could be had as well,
    and exact where the parts cancel. Cost: 2 out width rank operations, and one block of `SUMS_AT_ONCE` numbers.
    """
    rows = max(1, SUMS_AT_ONCE["cpu" if weight.device.type == "cpu" else "cuda"] // weight.shape[1])
    wide = sum_dtype(down)
    down = down.to(wide)
    blocks = zip(weight.split(rows), up.split(rows), strict=True)
    sums = (torch.addmm(w.to(wide), b.to(wide), down, alpha=scale) for w, b in blocks)
    return torch.cat([torch.linalg.vector_norm(part, dim=1) for part in sums])


def scale_outputs(
    z: Float[Tensor, "*tokens out"], gains: Float[Tensor, " out"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*tokens out"]:
    """y = g z + b with a learned factor of each output, as DoRA has in g = m / |W + s B A| (arXiv 2402.09353, eq. 5).

    Kept: g z alone, which without a bias is y. Gradients: dz = g dy, dg = (sum over tokens of dy g z) / g. No gain may
    be 0; their dtype may be wider than that of `z`: the product is rounded once.
    """
    y: Tensor = _ScaleOutputs.apply(z, gains, bias)
    return y


class _ScaleOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gains: Tensor, bias: Tensor | None) -> Tensor:
        y = _multiply_rounded(z, gains)
        ctx.save_for_backward(y, gains)
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y, gains = ctx.saved_tensors
        dgains = None
        if ctx.needs_input_grad[1]:
            dgains = (dy * y).view(-1, len(gains)).sum(0, dtype=gains.dtype).div_(gains)
        return _multiply_rounded(dy, gains), dgains, None


def rms_norm(
    x: Float[Tensor, "*tokens width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*tokens width"]:
    """Root-mean-square norm, y = w x / sqrt(mean(x^2) + eps) (arXiv 1910.07467), for a frozen weight.

    The quotient is rounded to x's dtype before the weight, as Llama's is; with a weight of a wider dtype the whole is
    rounded once, as Gemma's. Kept: x, and a float for each token. Gradient: dx = (g - n mean(g n)) / rms, with g = w dy
    and n the quotient.
    """
    if x.requires_grad:
        y: Tensor = _RMSNormFunction.apply(x, weight, eps)
        return y
    return _compute_rms_norm(x, weight, eps)[0]


def _compute_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / rms of each token."""
    if _has_native_norm(x, weight):
        return native.rms_norm(x, weight, eps)
    sums = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sum_dtype(x))  # one pass, no wider copy
    scale = sums.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (*tokens, 1)
    if weight.dtype != x.dtype:
        return torch.mul(x, scale).mul_(weight).to(x.dtype), scale
    return _multiply_rounded(x, scale).mul_(weight), scale


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _compute_rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        if _has_native_norm(x, weight):
            return native.rms_norm_backward(dy, x, weight, scale), None, None
        g = _multiply_rounded(dy, weight)
        along = torch.linalg.vecdot(g.to(scale.dtype), x.to(scale.dtype)).unsqueeze(-1)  # sum(g x)
        along.mul_(scale.square()).div_(-x.shape[-1])
        return _multiply_rounded(g.addcmul_(x, along.to(x.dtype)), scale), None, None


def _has_native_norm(x: Tensor, weight: Tensor) -> bool:
    return can_compute(x) and weight.dtype in (x.dtype, sum_dtype(x))


def _multiply_rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x times wider numbers, one for each token or each of a token's, rounded once."""
    return torch.mul(x, scale, out=torch.empty_like(x))


def apply_gate(gate_up: Float[Tensor, "*tokens twice"], activation: str = "silu") -> Float[Tensor, "*tokens width"]:
    """a(gate) * up of a joined projection whose first half is the gate (SwiGLU, GeGLU: arXiv 2002.05202).

    Kept: the projection alone; a(gate) is computed again for the gradient, but for GELU by torch on a CPU, where that
    would take a quarter of the time: there it is kept, too. The activation is a name in `ACTIVATIONS`.
    """
    if gate_up.requires_grad:
        y: Tensor = _ApplyGate.apply(gate_up, activation)
        return y
    if _has_native_gate(gate_up, activation):
        return native.apply_gate(gate_up, activation)
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation][0](gate).mul_(up)


class _ApplyGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        if _has_native_gate(gate_up, activation):
            ctx.save_for_backward(gate_up, None)
            return native.apply_gate(gate_up, activation)
        gate, up = gate_up.chunk(2, -1)
        active = ACTIVATIONS[activation][0](gate)
        again = activation == "silu" or gate_up.is_cuda
        ctx.save_for_backward(gate_up, None if again else active)
        return active.mul_(up) if again else active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        gate_up, active = ctx.saved_tensors
        if _has_native_gate(gate_up, ctx.activation):
            return native.apply_gate_backward(dy, gate_up, ctx.activation), None
        activate, backward_into = ACTIVATIONS[ctx.activation]
        gate, up = gate_up.chunk(2, -1)
        grad = torch.empty_like(gate_up)
        dgate, dup = grad.chunk(2, -1)
        torch.mul(dy, activate(gate) if active is None else active, out=dup)
        backward_into(dy * up, gate, grad_input=dgate)
        return grad, None


def _has_native_gate(gate_up: Tensor, activation: str) -> bool:
    return activation in native.ACTIVATIONS and can_compute(gate_up)


def apply_rotary(
    x: Float[Tensor, "tokens heads size"],
    cos: Float[Tensor, "tokens rotated"],
    sin: Float[Tensor, "tokens rotated"],
    interleaved: bool = False,
) -> Float[Tensor, "tokens heads size"]:
    """Rotary embedding (arXiv 2104.09864) of pairs of numbers: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        cos, sin: of each token's angles, which stand twice, as the pairs do. `rotated` of the `size` numbers of a head
            are rotated, and the others left.
        interleaved: pairs are neighbours, as in Cohere's models; else a pair is at one place of both halves.
    """
    if x.requires_grad:
        y: Tensor = _ApplyRotary.apply(x, cos, sin, interleaved)
        return y
    return rotate_heads(x, cos, sin, 1.0, interleaved)


class _ApplyRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotate_heads(x, cos, sin, 1.0, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate_heads(dy, cos, sin, -1.0, ctx.interleaved), None, None, None


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, direction: float, interleaved: bool = False) -> Tensor:
    """`apply_rotary` without autograd, forth or (`direction` -1) back."""
    y = torch.empty_like(x)
    if can_compute(x, cos, sin) and are_heads_adjacent(x):
        native.rotate_heads(x, cos, sin, direction, y, interleaved)
        return y
    rotated = cos.shape[-1]
    (x1, x2), (y1, y2) = (_split_pairs(t[..., :rotated], interleaved) for t in (x, y))
    c, s = (_split_pairs(t, interleaved)[0][:, None] for t in (cos, sin))
    torch.mul(x1, c, out=y1).addcmul_(x2, s, value=-direction)
    torch.mul(x2, c, out=y2).addcmul_(x1, s, value=direction)
    if rotated < x.shape[-1]:
        y[..., rotated:] = x[..., rotated:]
    return y


def _split_pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second
