"""Causal attention of packed sequences: examples that lie one behind the other in one row, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from training_lens.models.fast.native.attention_kernels import PackedAttentionCall, PackedSequences, ScoreSpec
from training_lens.models.fast.native.library import can_compute
from training_lens.utils.devices import has_native_bf16
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LARGEST_FLASH_HEAD = 256


def packed_attention(
    query: Float[Tensor, "tokens heads size"],
    key: Float[Tensor, "tokens groups size"],
    value: Float[Tensor, "tokens groups size"],
    packed: PackedSequences,
    scores: ScoreSpec,
) -> Float[Tensor, "tokens heads size"]:
    """softmax(s) v of each token over the tokens before it in its example, and itself; `ScoreSpec` defines s.

    Groups of heads share keys and values (arXiv 2305.13245). On CUDA by the flash kernel for variable lengths
    (arXiv 2307.08691) where it can compute this, on a CPU by ours; both keep no softmax weights for the backward pass.
    Elsewhere one example after the other by torch.
    """
    if can_use_varlen(query, scores):
        return _attend_with_varlen(query, key, value, packed, scores)
    if can_compute(query, key, value):
        attended: Tensor = _PackedAttention.apply(query, key, value, packed, scores)
        return attended
    return _attend_each_example(query, key, value, packed, scores)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scores: ScoreSpec
    ) -> Tensor:
        call = PackedAttentionCall(query, key, value, packed, scores)
        out, sums = call.attend()
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.settings = packed, scores
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        call = PackedAttentionCall(query, key, value, *ctx.settings)
        return *call.attend_backward(dout, out, sums), None, None


@cache
def find_varlen() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """torch's `varlen_attn` and the names of its parameters; None before torch 2.11, where it takes no scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before 2.10
        names = frozenset[str]()
    else:
        names = frozenset(inspect.signature(varlen_attn).parameters)
    if {"scale", "window_size"} <= names:
        return varlen_attn, names
    logger.info(
        "torch %s has no varlen_attn with a scale: packed examples attend one by one (2.11 has)", torch.__version__
    )
    return None


def can_use_varlen(query: Tensor, scores: ScoreSpec) -> bool:
    """Whether torch's flash kernel computes this: half precision, on CUDA from Ampere on, and no softcap."""
    is_fitting = query.is_cuda and scores.softcap is None and query.dtype in (torch.float16, torch.bfloat16)
    if not is_fitting or query.shape[-1] > LARGEST_FLASH_HEAD or query.shape[-1] % 8:
        return False
    return has_native_bf16(query.device) and find_varlen() is not None


def _attend_with_varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scores: ScoreSpec
) -> Tensor:
    found = find_varlen()
    assert found is not None, "can_use_varlen asks first"
    varlen_attn, names = found
    grouped = {}
    if (shared := query.shape[1] // key.shape[1]) > 1 and "enable_gqa" in names:  # from torch 2.12 on
        grouped = {"enable_gqa": True}
    elif shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    cu_seqlens, longest = packed.cu_seqlens(query.device), max(packed.lengths)
    attended = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scores.scale,
        window_size=(-1, 0) if scores.window is None else (scores.window - 1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(attended, Tensor), "no other results were asked for"
    return attended


def _attend_each_example(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scores: ScoreSpec
) -> Tensor:
    attended = []
    for start, end in packed.spans:
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))  # (1, heads, tokens, size)
        narrow = scores.window is not None and scores.window < end - start
        mask = causal_mask(end - start, scores.window, query.device) if narrow else None
        attended.append(attend_by_torch(q, k, v, mask, scores)[0].transpose(0, 1))
    return torch.cat(attended)


def attend_by_torch(
    query: Float[Tensor, "rows heads tokens size"],
    key: Float[Tensor, "rows groups keys size"],
    value: Float[Tensor, "rows groups keys size"],
    mask: Tensor | None,
    scores: ScoreSpec,
) -> Float[Tensor, "rows heads tokens size"]:
    """softmax(s) v by torch; `ScoreSpec` defines s, but for its window, which the mask has.

    The mask is added to the scores, or (bool) true where a key is seen; None: causal.
    """
    (rows, heads, length, size), groups = query.shape, key.shape[1]
    if length == 1:  # the heads that share a key stand where several tokens would: no key is copied
        query = query.reshape(rows, groups, heads // groups, size)
    elif heads > groups:
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    is_causal, cap = mask is None and length > 1, scores.softcap
    if cap is None:
        attended = scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scores.scale)
        return attended.reshape(rows, heads, length, size)
    if is_causal:
        mask = causal_mask(length, None, query.device)
    weights = cap * torch.tanh(torch.matmul(query, key.transpose(-1, -2)) * scores.scale / cap)
    if mask is not None and mask.dtype == torch.bool:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
    elif mask is not None:
        weights = weights + mask
    wide = torch.promote_types(value.dtype, torch.float32)
    return torch.matmul(weights.softmax(-1, dtype=wide).to(value.dtype), value).reshape(rows, heads, length, size)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(length, length) bool: true where a token sees another."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)
