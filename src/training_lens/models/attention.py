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
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])[None]

    def starts(self, device: torch.device) -> Tensor:
        """(examples + 1,) int32: where each begins, and the end."""
        return torch.tensor([0, *(end for _, end in self.bounds)], dtype=torch.int32, device=device)


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
    2307.08691); elsewhere matrix products by example, whose weights are kept for the backward pass.

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
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: Any
    ) -> Tensor:
        groups = key.shape[1]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        kept = []
        for start, end in segments.bounds:
            q = _by_group(query[start:end], groups) * scale  # (groups, shared * length, width)
            k, v = key[start:end].transpose(0, 1), value[start:end].transpose(0, 1)  # (groups, length, width)
            mask = _mask(end - start, window, query.shape[1] // groups, query.dtype)
            weights = torch.baddbmm(mask, q, k.transpose(1, 2)).softmax(-1)
            _by_token(out[start:end], groups).copy_((weights @ v).view(groups, -1, end - start, v.shape[-1]))
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups = key.shape[1]
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for (start, end), weights in zip(ctx.segments.bounds, kept, strict=True):
            q, do = _by_group(query[start:end], groups) * ctx.scale, _by_group(dout[start:end], groups)
            k, v = key[start:end].transpose(0, 1), value[start:end].transpose(0, 1)
            dweights = do @ v.transpose(1, 2)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dscaled = (dscores @ k).mul_(ctx.scale)
            _by_token(dq[start:end], groups).copy_(dscaled.view(groups, -1, end - start, k.shape[-1]))
            dk[start:end] = (dscores.transpose(1, 2) @ q).transpose(0, 1)
            dv[start:end] = (weights.transpose(1, 2) @ do).transpose(0, 1)
        return dq, dk, dv, None, None, None


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
