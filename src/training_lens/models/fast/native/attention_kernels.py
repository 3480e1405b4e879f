"""Causal attention of packed sequences and its gradient, by kernels in C where `library.can_compute`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.models.fast.native.library import KernelCall, are_heads_adjacent, define_call, run_kernel, sum_dtype
from training_lens.utils.devices import move_to_device

BLOCK, CHUNK, COLUMNS = 32, 256, 32  # of attention.h and kernels.h


@dataclass(frozen=True)
class PackedSequences:
    """Sequences that lie one behind the other in one row, without padding: their lengths, in order."""

    lengths: tuple[int, ...]

    @cached_property
    def bounds(self) -> Tensor:
        """(sequences + 1,) int64: the first token of each, and the end."""
        return torch.tensor(list(accumulate(self.lengths, initial=0)))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each begins and ends."""
        return list(pairwise(self.bounds.tolist()))

    @cached_property
    def _bounds_by_device(self) -> dict[torch.device, Tensor]:
        return {}

    def position_ids(self, device: torch.device) -> Tensor:
        """(1, tokens) int64: each token's place in its sequence."""
        return move_to_device(torch.cat([torch.arange(length) for length in self.lengths])[None], device)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """The `bounds` on a device, int32; copied there once, for all layers."""
        if device not in self._bounds_by_device:
            self._bounds_by_device[device] = move_to_device(self.bounds.int(), device)
        return self._bounds_by_device[device]

    def work_order(self, groups: int) -> Tensor:
        """(sequences * groups,) int64: pairs of both in the order in which workers take them, the longest first."""
        longest = torch.tensor(self.lengths).argsort(descending=True, stable=True)
        return (longest[:, None] * groups + torch.arange(groups)).flatten()


@dataclass(frozen=True)
class ScoreSpec:
    """How attention weighs keys: softmax of s = scale q k^T, or of softcap tanh(s / softcap) (arXiv 2408.00118)."""

    scale: float
    window: int | None = None  # a token sees so many of the last tokens, itself included; None: all
    softcap: float | None = None


ATTENTION_FIELDS = (
    "query key value out sums scratch bounds order dout dquery dkey dvalue",
    "tokens heads groups size window workers items query_stride key_stride value_stride scratch_stride gradient_stride",
    "scale softcap",
)
AttendCall = define_call("attend", *ATTENTION_FIELDS)
AttendBackCall = define_call("attend_back", *ATTENTION_FIELDS)


class PackedAttentionCall:
    """A call of the kernels in C for causal attention: query (tokens, heads, size), others (tokens, groups, size)."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scores: ScoreSpec) -> None:
        given = (query, key, value)
        self.query, self.key, self.value = (t if are_heads_adjacent(t) else t.contiguous() for t in given)
        self.packed, self.scores = packed, scores
        self.heads, self.groups = query.shape[1], key.shape[1]
        self._items = len(packed.lengths) * self.groups
        self._workers = min(torch.get_num_threads(), self._items)

    def attend(self) -> tuple[Float[Tensor, "tokens heads size"], Float[Tensor, "heads tokens"]]:
        """softmax(s) v of each token over its sequence so far, and the logs of the softmax' sums, in their dtype."""
        out = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        sums = self.query.new_empty(self.heads, len(self.query), dtype=sum_dtype(self.query))
        nothing = dict.fromkeys(("dout", "dquery", "dkey", "dvalue"))
        self._run(AttendCall, out=out, sums=sums, scratch=self._scratch(1, 1, 2), gradient_stride=0, **nothing)
        return out, sums

    def attend_backward(self, dout: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value; `out` and `sums` are what `attend` gave."""
        tokens, _, size = self.query.shape
        fused = self.query.new_empty(tokens, self.heads + 2 * self.groups, size)
        dquery, dkey, dvalue = fused.split([self.heads, self.groups, self.groups], 1)
        self._run(
            AttendBackCall, out=out, sums=sums, scratch=self._scratch(2, 3, 4), dout=dout.contiguous(),
            dquery=dquery, dkey=dkey, dvalue=dvalue, gradient_stride=fused.stride(0),
        )  # fmt: skip
        return dquery, dkey, dvalue

    def _run(self, kind: type[KernelCall], scratch: Tensor, **values: Any) -> None:
        tokens, heads, size = self.query.shape
        call = kind(
            query=self.query, key=self.key, value=self.value, scratch=scratch, bounds=self.packed.bounds,
            order=self.packed.work_order(self.groups), tokens=tokens, heads=heads, groups=self.groups, size=size,
            window=self.scores.window or 0, workers=self._workers, items=self._items,
            query_stride=self.query.stride(0), key_stride=self.key.stride(0), value_stride=self.value.stride(0),
            scratch_stride=scratch.shape[1], scale=self.scores.scale, softcap=self.scores.softcap or 0.0, **values,
        )  # fmt: skip
        run_kernel(call, self.query.dtype, self._workers)

    def _scratch(self, plain: int, rounded: int, parts: int) -> Tensor:
        """Memory of each worker: multiples of a head's size, plain and rounded up, by token, and of a block's parts."""
        keys, size = _round_up(max(self.packed.lengths)), self.query.shape[2]
        count = (keys + BLOCK) * (plain * size + rounded * _round_up(size)) + parts * BLOCK * CHUNK
        return self.query.new_empty(self._workers, count, dtype=sum_dtype(self.query))


def _round_up(count: int) -> int:
    return -(-count // COLUMNS) * COLUMNS
