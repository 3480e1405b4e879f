"""Causal attention within examples that lie one behind the other in a line of tokens, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from training_lens.utils.devices import moved

LONG = 512  # tokens of an example: up to here products are faster on a CPU, behind it their weights take the memory


@dataclass(frozen=True)
class Segments:
    """The lengths of the examples in a line of tokens, in order."""

    lengths: tuple[int, ...]

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Where each begins and ends."""
        return tuple(pairwise(accumulate(self.lengths, initial=0)))

    def positions(self, device: torch.device) -> Tensor:
        """(1, tokens) int64: each token's place in its example."""
        return moved(torch.cat([torch.arange(length) for length in self.lengths])[None], device)

    def starts(self, device: torch.device) -> Tensor:
        """(examples + 1,) int32: where each begins, and the end."""
        return moved(torch.tensor([0, *(end for _, end in self.bounds)], dtype=torch.int32), device)


def segment_attention(
    query: Float[Tensor, "tokens heads width"],
    key: Float[Tensor, "tokens groups width"],
    value: Float[Tensor, "tokens groups width"],
    segments: Segments,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "tokens heads width"]:
    """softmax(scale q k^T) v of each token over those before it in its example, and itself.

    Groups of heads share keys and values (arXiv 2305.13245). On CUDA the flash kernel for variable lengths (arXiv
    2307.08691); elsewhere matrix products by example, whose weights are kept for the backward pass, and for examples
    beyond `LONG` tokens torch's flash kernel, which keeps none.

    Args:
        window: a token sees so many of the last tokens, itself included; None: all.
    """
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        starts, longest = segments.starts(query.device), max(segments.lengths)
        near = (-1, 0) if window is None else (window - 1, 0)
        grouped = query.shape[1] != key.shape[1]
        attended = varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scale, window_size=near, enable_gqa=grouped
        )
    else:
        attended = _SegmentAttention.apply(query, key, value, segments, scale, window)
    assert isinstance(attended, Tensor), "no other results were asked for"
    return attended


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        kept = []
        for start, end in segments.bounds:
            way = _flash if end - start > LONG else _products
            kept.append(way(query[start:end], key[start:end], value[start:end], scale, window, out[start:end]))
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        query, key, value, out, *kept = ctx.saved_tensors
        grads = tuple(torch.empty_like(t) for t in (query, key, value))
        for (start, end), one in zip(ctx.segments.bounds, kept, strict=True):
            q, k, v, o, do = (t[start:end] for t in (query, key, value, out, dout))
            into = tuple(grad[start:end] for grad in grads)
            if end - start > LONG:
                _flash_backward(q, k, v, o, do, one, ctx.scale, ctx.window, into)
            else:
                _products_backward(q, k, v, do, one, ctx.scale, into)
        return *grads, None, None, None


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, out: Tensor) -> Tensor:
    """One example by matrix products; gives its weights, (groups, shared * length, length)."""
    groups, length = k.shape[1], len(q)
    mask = _mask(length, window, q.shape[1] // groups, q.dtype)
    scores = torch.baddbmm(mask, _by_group(q, groups) * scale, k.permute(1, 2, 0))
    weights = scores.softmax(-1)
    _by_token(out, groups).copy_((weights @ v.transpose(0, 1)).view(groups, -1, length, v.shape[-1]))
    return weights


def _products_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, weights: Tensor, scale: float, into: tuple[Tensor, ...]
) -> None:
    groups, length = k.shape[1], len(q)
    do = _by_group(dout, groups)
    dweights = do @ v.permute(1, 2, 0)
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
    dq = (dscores @ k.transpose(0, 1)).mul_(scale)
    _by_token(into[0], groups).copy_(dq.view(groups, -1, length, k.shape[-1]))
    into[1].copy_((dscores.transpose(1, 2) @ (_by_group(q, groups) * scale)).transpose(0, 1))
    into[2].copy_((weights.transpose(1, 2) @ do).transpose(0, 1))


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, out: Tensor) -> Tensor:
    """One long example by torch's kernel, which keeps no weights; gives the logarithms of their sums."""
    mask = _near(len(q), window, q.dtype)
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_by_head(q, k, v), 0.0, mask is None, attn_mask=mask, scale=scale
    )
    out.copy_(found[0].transpose(0, 1))
    return sums  # type: ignore[no-any-return]


def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, sums: Tensor, scale: float, window: int | None,
    into: tuple[Tensor, ...],
) -> None:  # fmt: skip
    mask = _near(len(q), window, q.dtype)
    of_out, of_dout = (t.transpose(0, 1)[None].contiguous() for t in (out, dout))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        of_dout, *_by_head(q, k, v), of_out, sums, 0.0, mask is None, attn_mask=mask, scale=scale
    )
    into[0].copy_(dq[0].transpose(0, 1))
    for grad, shared in zip(into[1:], (dk, dv), strict=True):  # keys get the gradients of all heads that share them
        grad.copy_(shared[0].view(k.shape[1], -1, *shared.shape[2:]).sum(1).transpose(0, 1))


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Each (1, heads, length, width), keys and values repeated for the heads that share them."""
    alike = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (q, k, v))
    return tuple(t.transpose(0, 1)[None].contiguous() for t in alike)


def _near(length: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """(length, length) mask of a window; None: a token sees all before it."""
    return _mask(length, window, 1, dtype)[0] if window is not None and window < length else None


def _by_token(x: Tensor, groups: int) -> Tensor:
    """(length, heads, width) seen as (groups, shared, length, width)."""
    return x.view(x.shape[0], groups, -1, x.shape[-1]).permute(1, 2, 0, 3)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(length, heads, width) -> (groups, shared * length, width): the heads that share keys as more rows."""
    return _by_token(x, groups).reshape(groups, -1, x.shape[-1])


@lru_cache(maxsize=64)
def _mask(length: int, window: int | None, shared: int, dtype: torch.dtype) -> Tensor:
    """(1, shared * length, length): 0 where a token sees another, and -inf elsewhere."""
    ahead = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)
    if window is not None:
        ahead += torch.full_like(ahead, -torch.inf).tril(-window)
    return ahead.repeat(shared, 1)[None]
