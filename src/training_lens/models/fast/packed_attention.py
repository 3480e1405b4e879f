"""Causal attention within examples that lie one behind the other in a line of tokens, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from training_lens.models.fast.native.attention_kernels import PackedLayout, attend_packed, attend_packed_backward
from training_lens.models.fast.native.library import can_compute
from training_lens.utils.devices import move_to_device


@dataclass(frozen=True)
class PackedSequences:
    """The lengths of the examples in a line of tokens, in order."""

    lengths: tuple[int, ...]

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where each begins and ends."""
        return tuple(pairwise(accumulate(self.lengths, initial=0)))

    @cached_property
    def line(self) -> PackedLayout:
        """As the kernels want them."""
        return PackedLayout(self.lengths)

    def position_ids(self, device: torch.device) -> Tensor:
        """(1, tokens) int64: each token's place in its example."""
        return move_to_device(torch.cat([torch.arange(length) for length in self.lengths])[None], device)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """(examples + 1,) int32: where each begins, and the end."""
        return move_to_device(torch.tensor([0, *(end for _, end in self.spans)], dtype=torch.int32), device)


def packed_attention(
    query: Float[Tensor, "tokens heads width"],
    key: Float[Tensor, "tokens groups width"],
    value: Float[Tensor, "tokens groups width"],
    packed: PackedSequences,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "tokens heads width"]:
    """softmax(scale q k^T) v of each token over those before it in its example, and itself.

    Groups of heads share keys and values (arXiv 2305.13245). No weights are kept for the backward pass: on CUDA by the
    flash kernel for variable lengths (arXiv 2307.08691), on a CPU by ours, and elsewhere by what torch has for one
    example after the other.

    Args:
        window: a token sees so many of the last tokens, itself included; None: all.
    """
    if query.is_cuda:
        return _attend_with_varlen(query, key, value, packed, scale, window)
    if can_compute(query, key, value):
        attended: Tensor = _PackedAttention.apply(query, key, value, packed, scale, window)
        return attended
    return _attend_each_example(query, key, value, packed, scale, window)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float, window: int | None
    ) -> Tensor:
        out, sums = attend_packed(query, key, value, packed.line, scale, window)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.settings = packed.line, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return *attend_packed_backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None


def _attend_with_varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float, window: int | None
) -> Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = packed.cu_seqlens(query.device), max(packed.lengths)
    near = (-1, 0) if window is None else (window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    attended = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scale, window_size=near, enable_gqa=grouped
    )
    assert isinstance(attended, Tensor), "no other results were asked for"
    return attended


def _attend_each_example(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float, window: int | None
) -> Tensor:  # fmt: skip
    found = []
    for start, end in packed.spans:
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        seen = None if window is None or window >= end - start else _window_mask(end - start, window, query.device)
        attended = scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=True)
        found.append(attended[0].transpose(0, 1))
    return torch.cat(found)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool: true where a token sees another."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)
