"""Causal attention of examples in a line, forth and back, by kernels in C; `calls.can_take` says whether they do."""

from __future__ import annotations

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
    """The lengths of the examples in a line, and in which order they are best computed."""

    lengths: tuple[int, ...]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(examples + 1,) int64: where each begins, and the end."""
        return torch.tensor(list(accumulate(self.lengths, initial=0)))

    def work_order(self, groups: int) -> Tensor:
        """(examples * groups,) int64: examples with a group each, the longest first, dealt out to workers in turn."""
        longest = torch.tensor(self.lengths).argsort(descending=True, stable=True)
        return (longest[:, None] * groups + torch.arange(groups)).flatten()


@dataclass(frozen=True)
class _AttentionCall:
    """One call's sizes: what both directions tell their kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    line: PackedLayout
    window: int | None

    @property
    def groups(self) -> int:
        return self.key.shape[1]

    @property
    def items(self) -> int:
        return len(self.line.lengths) * self.groups

    @property
    def workers(self) -> int:
        return min(torch.get_num_threads(), self.items)

    def of(self, scratch: Tensor) -> tuple[int, ...]:
        tokens, heads, size = self.query.shape
        strides = (t.stride(0) for t in (self.query, self.key, self.value))
        return (
            tokens, heads, self.groups, size, self.window or 0, *strides, self.workers, self.items, scratch.shape[1],
        )  # fmt: skip

    def scratch(self, by_key: tuple[int, int], by_query: tuple[int, int], by_pair: int) -> Tensor:
        """Room of each worker: so many numbers for each key and query, times a head's width as it is, and filled."""
        keys, size = _round_up(max(self.line.lengths)), self.query.shape[2]
        widths = (size, _round_up(size))
        one = sum(keys * count * width for count, width in zip(by_key, widths, strict=True))
        one += sum(BLOCK * count * width for count, width in zip(by_query, widths, strict=True))
        return self.query.new_empty(self.workers, one + by_pair * BLOCK * keys, dtype=sum_dtype(self.query))


def _round_up(count: int) -> int:
    return -(-count // COLUMNS) * COLUMNS


def attend_packed(
    query: Float[Tensor, "tokens heads width"],
    key: Float[Tensor, "tokens groups width"],
    value: Float[Tensor, "tokens groups width"],
    line: PackedLayout,
    scale: float,
    window: int | None,
) -> tuple[Float[Tensor, "tokens heads width"], Float[Tensor, "heads tokens"]]:
    """softmax(scale q k^T) v of each token over its example so far, and the logarithms of the weights' sums.

    The latter are in the dtype of sums. A window is how many of the last tokens one sees, itself included.
    """
    work = _AttentionCall(
        _make_heads_adjacent(query), _make_heads_adjacent(key), _make_heads_adjacent(value), line, window
    )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = query.new_empty(query.shape[1], len(query), dtype=sum_dtype(query))
    scratch = work.scratch((1, 1), (1, 1), 1)
    at = (work.query, work.key, work.value, out, sums, scratch, line.cu_seqlens, line.work_order(work.groups))
    call_kernel("attend", query.dtype, work.workers, at, work.of(scratch), (scale,))
    return out, sums


def attend_packed_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
    line: PackedLayout, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value; `out` and `sums` are what `attend_packed` gave."""
    work = _AttentionCall(
        _make_heads_adjacent(query), _make_heads_adjacent(key), _make_heads_adjacent(value), line, window
    )
    heads, groups = query.shape[1], work.groups
    together = query.new_empty(len(query), heads + 2 * groups, query.shape[2])
    grads = together.split([heads, groups, groups], 1)
    scratch = work.scratch((2, 3), (2, 3), 2)
    read = (
        work.query,
        work.key,
        work.value,
        out,
        sums,
        scratch,
        line.cu_seqlens,
        line.work_order(groups),
        dout.contiguous(),
    )
    of = (*work.of(scratch), together.stride(0))
    call_kernel("attend_back", query.dtype, work.workers, (*read, *grads), of, (scale,))
    return grads[0], grads[1], grads[2]


def _make_heads_adjacent(x: Tensor) -> Tensor:
    """Whose heads lie one behind the other, whatever is between tokens."""
    return x if are_heads_adjacent(x) else x.contiguous()
