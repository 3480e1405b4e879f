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
GRAIN = 32  # products are as long as a multiple of so many tokens: oneDNN prepares each new shape anew


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
        query, kept = query * scale, []
        for start, end in segments.bounds:
            part = _computed(start, end, len(query))
            q, k, v, into = (t[part] for t in (query, key, value, out))
            if end - start > LONG:
                kept.append(_flash(q, k, v, window, into))
            else:
                kept.append(_products(q, k, v, window, into, end - start))
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        query, key, value, out, *kept = ctx.saved_tensors
        grads = tuple(torch.empty_like(t) for t in (query, key, value))
        for (start, end), one in zip(ctx.segments.bounds, kept, strict=True):
            part = _computed(start, end, len(query))
            q, k, v, o, do = (t[part] for t in (query, key, value, out, dout))
            into = tuple(grad[part] for grad in grads)
            if end - start > LONG:
                _flash_backward(q, k, v, o, do, one, ctx.window, into)
            else:
                _products_backward(q, k, v, do, one, into)
        grads[0].mul_(ctx.scale)
        return *grads, None, None, None


def _computed(start: int, end: int, tokens: int) -> slice:
    """What is computed of an example: up to `GRAIN` tokens more, which the next ones, done later, write over."""
    more = 0 if end - start > LONG else (start - end) % GRAIN
    return slice(start, min(end + more, tokens))


def _products(q: Tensor, k: Tensor, v: Tensor, window: int | None, out: Tensor, own: int) -> Tensor:
    """One example of `own` tokens by matrix products; gives its weights, (groups, shared * length, length).

    No token sees one behind it, so that those beyond the example's own change nothing; their weights are 0, and so
    nothing comes back from them either.
    """
    groups, length = k.shape[1], len(q)
    scores = _by_group(q, groups) @ k.permute(1, 2, 0).contiguous()
    scores.view(groups, -1, length, length).add_(_mask(length, window, q.dtype))
    weights = scores.softmax(-1)
    weights.view(groups, -1, length, length)[:, :, own:] = 0
    _by_token(out, groups).copy_((weights @ _by_group(v, groups)).view(groups, -1, length, v.shape[-1]))
    return weights


def _products_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, weights: Tensor, into: tuple[Tensor, ...]
) -> None:
    groups, length = k.shape[1], len(q)
    do = _by_group(dout, groups)
    dweights = do @ v.permute(1, 2, 0).contiguous()
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
    dq = dscores @ _by_group(k, groups)
    _by_token(into[0], groups).copy_(dq.view(groups, -1, length, k.shape[-1]))
    into[1].copy_((dscores.transpose(1, 2) @ _by_group(q, groups)).transpose(0, 1))
    into[2].copy_((weights.transpose(1, 2) @ do).transpose(0, 1))


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, out: Tensor) -> Tensor:
    """One long example by torch's kernel, which keeps no weights; gives the logarithms of their sums."""
    mask = _near(len(q), window, q.dtype)
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_by_head(q, k, v), 0.0, mask is None, attn_mask=mask, scale=1.0
    )
    out.copy_(found[0].transpose(0, 1))
    return sums  # type: ignore[no-any-return]


def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, sums: Tensor, window: int | None,
    into: tuple[Tensor, ...],
) -> None:  # fmt: skip
    mask = _near(len(q), window, q.dtype)
    of_out, of_dout = (t.transpose(0, 1)[None].contiguous() for t in (out, dout))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        of_dout, *_by_head(q, k, v), of_out, sums, 0.0, mask is None, attn_mask=mask, scale=1.0
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
    return _mask(length, window, dtype) if window is not None and window < length else None


def _by_token(x: Tensor, groups: int) -> Tensor:
    """(length, heads, width) seen as (groups, shared, length, width)."""
    return x.view(x.shape[0], groups, -1, x.shape[-1]).permute(1, 2, 0, 3)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(length, heads, width) -> (groups, shared * length, width): the heads that share keys as more rows."""
    return _by_token(x, groups).reshape(groups, -1, x.shape[-1])


@lru_cache(maxsize=64)
def _mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(length, length): 0 where a token sees another, and -inf elsewhere."""
    ahead = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)
    if window is not None:
        ahead += torch.full_like(ahead, -torch.inf).tril(-window)
    return ahead
