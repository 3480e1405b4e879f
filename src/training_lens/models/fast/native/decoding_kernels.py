"""What decoding computes by kernels in C; `calls.can_compute` says whether they take a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from training_lens.models.fast.native.attention_kernels import ScoreSpec
from training_lens.models.fast.native.library import GRAIN, call_kernel, can_compute, has_kernel


class NewestTokens(NamedTuple):
    """One token of each row, for attention: (rows, heads or groups, size), a row's heads adjacent.

    cos, sin: (rows, rotated), dense; `rotated` numbers of a head are rotated by halves, none where it is 0.
    """

    query: Float[Tensor, "rows heads size"]
    key: Float[Tensor, "rows groups size"]
    value: Float[Tensor, "rows groups size"]
    cos: Float[Tensor, "rows rotated"]
    sin: Float[Tensor, "rows rotated"]


class CachedTokens(NamedTuple):
    """A KV cache of which rows see the columns from `first` (rows,) int64 to `end` - 1, which is the newest token's.

    keys, values: (rows, groups, columns, size), dense, of one shape.
    """

    keys: Float[Tensor, "rows groups columns size"]
    values: Float[Tensor, "rows groups columns size"]
    first: Int[Tensor, " rows"]
    end: int


def attend_newest_tokens(
    newest: NewestTokens, cached: CachedTokens, scores: ScoreSpec
) -> Float[Tensor, "rows heads size"]:
    """Write each row's newest token into the cache, and give its softmax(s) v; `ScoreSpec` defines s.

    Queries and keys are rotated first. Keys and values are read once for all heads that share them, and only columns
    that a row sees.
    """
    query, (rows, heads, size), groups = newest.query, newest.query.shape, cached.keys.shape[1]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    strides = (t.stride(0) for t in (query, newest.key, newest.value))
    sizes = (heads, groups, size, newest.cos.shape[-1], cached.end, scores.window or 0)
    of = (*sizes, *strides, cached.keys.stride(0), cached.keys.stride(1))
    given = (query, newest.key, newest.value, newest.cos, newest.sin, cached.keys, cached.values, cached.first, out)
    most = 2 * (heads // groups) * size * cached.end  # products of an item, also of columns that the row does not see
    settings = (scores.scale, scores.softcap or 0.0)
    call_kernel("attend_newest", query.dtype, rows * groups, given, of, settings, min(most, GRAIN))
    return out


class FewRowsLinear:
    """x W^T + b of layers on one input whose outputs lie side by side, from their plain weights, for few rows.

    Bound by the memory that the weights are read from, where oneDNN's kernels are made for many rows. A row's result is
    the same whatever rows are beside it.

    Args:
        weights: (out, width) each, and bias (sum of outs,), as `can_compute` wants them.
    """

    MOST = 64  # rows; more are better left to oneDNN
    OUTS, WIDTH, LAYERS = 4, 32, 8  # multiples of what products.h takes, and how many layers at most

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        self._weights, self._bias = tuple(weights), bias
        *firsts, self._outs = accumulate(map(len, weights), initial=0)
        self._firsts = torch.tensor(firsts)

    @classmethod
    def can_compute(cls, weights: Sequence[Tensor], bias: Tensor | None) -> bool:
        """Whether there is a kernel for them on this processor."""
        tensors = [*weights] if bias is None else [*weights, bias]
        kernel = len(weights) <= cls.LAYERS and can_compute(*tensors) and has_kernel("few_rows", weights[0].dtype)
        whole = all(len(w) % cls.OUTS == 0 and w.shape[1] % cls.WIDTH == 0 for w in weights)
        return kernel and whole and all(t.is_contiguous() for t in tensors)

    def __call__(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows outs"]:
        """Of one row at least.

        Raises:
            ValueError: x is of another width or dtype than the weights.
        """
        width, dtype = self._weights[0].shape[1], self._weights[0].dtype
        if x.shape[-1] != width or x.dtype != dtype:
            raise ValueError(f"rows of {x.shape[-1]} {x.dtype} for weights of {width} {dtype}")
        y, rows = x.new_empty(*x.shape[:-1], self._outs), x.numel() // width
        of = (rows, width, self._outs, len(self._weights))
        at = (x.contiguous(), y, self._firsts, self._bias, *self._weights)
        call_kernel("few_rows", dtype, self._outs // self.OUTS, at, of, size=self.OUTS * width * rows)
        return y


class LoRABranches:
    """The low-rank branches of layers whose outputs lie side by side: y += (x A^T) B^T, for some rows.

    In the dtype of sums until y is rounded, as PEFT computes beside weights of fewer bits.

    Args:
        factors: A (rank, width) and B (out, rank) of each layer, B with the adapter's scale.
    """

    LANES, WIDTH, TILE = 16, 64, 8  # ranks are filled to multiples of; of decoding.h; of kernels.h

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        ranks, outs = [len(down) for down, _ in factors], [len(up) for _, up in factors]
        wide = torch.promote_types(dtype, torch.float32)
        filled = sum(ranks) - ranks[-1] + max(ranks)  # so many are read of each layer, also where it has fewer
        down = torch.cat([down for down, _ in factors]).to(wide)
        self._down = pad(down.T, (0, filled + -filled % self.LANES - len(down))).contiguous()  # (width, ranks)
        firsts = zip(accumulate(outs, initial=0), accumulate(ranks, initial=0), factors, strict=False)
        blocks, ups = [], []
        for column, rank, (_, up) in firsts:
            for start, part in zip(range(0, len(up), self.WIDTH), up.split(self.WIDTH), strict=True):
                blocks.append((column + start, len(part), rank))
                ups.append(pad(part.T.to(wide), (0, self.WIDTH - len(part), 0, max(ranks) - part.shape[1])))
        self._up, self._blocks = torch.stack(ups), torch.tensor(blocks)

    def add_to(self, x: Float[Tensor, "rows width"], y: Float[Tensor, "rows outs"]) -> None:
        """Add them to y, which is dense; x of the same dtype."""
        (rows, outs), (width, ranks), (blocks, rank, _) = y.shape, self._down.shape, self._up.shape
        panel = min(-(-rows // torch.get_num_threads()), self.TILE)
        at = (x.contiguous(), y, self._down, self._up, self._blocks)
        one = panel * (ranks * width + rank * outs)
        call_kernel(
            "branches", x.dtype, -(-rows // panel), at, (rows, width, outs, ranks, blocks, rank, panel), size=one
        )
