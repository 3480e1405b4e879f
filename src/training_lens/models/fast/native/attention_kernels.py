"""Causal attention of packed sequences and its gradient, by kernels in C where `library.can_compute`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.models.fast.native.library import are_heads_adjacent, call_kernel, sum_dtype

BLOCK, COLUMNS = 32, 32  # of attention.h


@dataclass(frozen=True)
class PackedLayout:
    """The lengths of packed sequences, and the order in which they are best computed."""

    lengths: tuple[int, ...]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(sequences + 1,) int64: the first token of each, and the end."""
        return torch.tensor(list(accumulate(self.lengths, initial=0)))

    def work_order(self, groups: int) -> Tensor:
        """(sequences * groups,) int64: pairs of both, the longest first; workers take them in turn."""
        longest = torch.tensor(self.lengths).argsort(descending=True, stable=True)
        return (longest[:, None] * groups + torch.arange(groups)).flatten()


@dataclass(frozen=True)
class ScoreSpec:
    """How attention weighs keys: softmax of s = scale q k^T, or of softcap tanh(s / softcap) (arXiv 2408.00118).

    `window`: a token sees so many of the last tokens, itself included; None: all.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class PackedAttentionCall:
    """One call of the kernels in C for causal attention of packed sequences.

    Args:
        query: (tokens, heads, size).
        key, value: (tokens, groups, size).
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scores: ScoreSpec) -> None:
        self.query, self.key, self.value = (_make_heads_adjacent(t) for t in (query, key, value))
        self.layout, self.scores = layout, scores
        self.heads, self.groups = query.shape[1], key.shape[1]
        self._items = len(layout.lengths) * self.groups
        self._workers = min(torch.get_num_threads(), self._items)

    def attend(self) -> tuple[Float[Tensor, "tokens heads size"], Float[Tensor, "heads tokens"]]:
        """softmax(s) v of each token over its sequence so far, and the logarithms of the softmax' sums.

        The latter are in the dtype of sums.
        """
        out = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        sums = self.query.new_empty(self.heads, len(self.query), dtype=sum_dtype(self.query))
        self._call("attend", self._scratch((1, 1), (1, 1), 1), out, sums)
        return out, sums

    def attend_backward(self, dout: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value; `out` and `sums` are what `attend` gave."""
        tokens, _, size = self.query.shape
        fused = self.query.new_empty(tokens, self.heads + 2 * self.groups, size)
        dquery, dkey, dvalue = fused.split([self.heads, self.groups, self.groups], 1)
        gradients = (dout.contiguous(), dquery, dkey, dvalue)
        self._call("attend_back", self._scratch((2, 3), (2, 3), 2), out, sums, gradients, (fused.stride(0),))
        return dquery, dkey, dvalue

    def _call(
        self,
        kernel: str,
        scratch: Tensor,
        out: Tensor,
        sums: Tensor,
        gradients: Sequence[Tensor] = (),
        of: tuple[int, ...] = (),
    ) -> None:
        tokens, heads, size = self.query.shape
        strides = (t.stride(0) for t in (self.query, self.key, self.value))
        window, softcap = self.scores.window or 0, self.scores.softcap or 0.0
        sizes = (tokens, heads, self.groups, size, window, *strides, self._workers, self._items, scratch.shape[1])
        order = self.layout.work_order(self.groups)
        read = (self.query, self.key, self.value, out, sums, scratch, self.layout.cu_seqlens, order)
        settings = (self.scores.scale, softcap)
        call_kernel(kernel, self.query.dtype, self._workers, (*read, *gradients), (*sizes, *of), settings)

    def _scratch(self, by_key: tuple[int, int], by_query: tuple[int, int], by_pair: int) -> Tensor:
        """Memory of each worker: so many numbers for each key and query, times a head's size, plain and rounded up."""
        keys, size = _round_up(max(self.layout.lengths)), self.query.shape[2]
        widths = (size, _round_up(size))
        one = sum(keys * count * width for count, width in zip(by_key, widths, strict=True))
        one += sum(BLOCK * count * width for count, width in zip(by_query, widths, strict=True))
        return self.query.new_empty(self._workers, one + by_pair * BLOCK * keys, dtype=sum_dtype(self.query))


def _round_up(count: int) -> int:
    return -(-count // COLUMNS) * COLUMNS


def _make_heads_adjacent(x: Tensor) -> Tensor:
    return x if are_heads_adjacent(x) else x.contiguous()
