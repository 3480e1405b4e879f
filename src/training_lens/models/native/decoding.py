"""What decoding computes by kernels in C; `calls.can_take` says whether they take a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training_lens.models.native.calls import GRAIN, call


def attend_newest(
    query: Float[Tensor, "rows heads size"],
    keys: Float[Tensor, "rows groups columns size"],
    values: Float[Tensor, "rows groups columns size"],
    first: Int[Tensor, " rows"],
    end: int,
    scale: float,
    window: int | None,
) -> Float[Tensor, "rows heads size"]:
    """softmax(scale q k^T) v of each row's newest token, which stands in column `end` - 1.

    Keys and values are read once for all heads that share them, and only where a row has any.

    Args:
        query: a row's heads lie one behind the other, whatever is between rows.
        keys, values: dense, of the same shape.
        first: the first column that each row sees; before `end`.
        window: the columns that it sees at most; None: all.
    """
    rows, heads, size = query.shape
    groups = keys.shape[1]
    mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
    of = (heads, groups, size, end, window or 0, query.stride(0), keys.stride(0), keys.stride(1))
    most = 2 * (heads // groups) * size * end  # products of an item, some of which are none of the row's
    call(
        "attend_newest", query.dtype, rows * groups, (query, keys, values, first, mixed), of, (scale,), min(most, GRAIN)
    )
    return mixed


class Branches:
    """The low-rank branches of layers whose outputs lie side by side: y += (x A^T) B^T, for some rows.

    In the dtype of sums until y is rounded, as PEFT computes beside weights of fewer bits.

    Args:
        factors: A (rank, width) and B (out, rank) of each layer, B with the adapter's scale.
    """

    WIDTH, TOGETHER = 64, 4  # of decoding.h

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        ranks, outs = [len(down) for down, _ in factors], [len(up) for _, up in factors]
        wide = torch.promote_types(dtype, torch.float32)
        filled = sum(ranks) - ranks[-1] + max(ranks)  # so many are read of each layer, also where it has fewer
        filled += -filled % self.TOGETHER
        self._down = factors[0][0].new_zeros(filled, factors[0][0].shape[1], dtype=wide)
        torch.cat([down for down, _ in factors], out=self._down[: sum(ranks)])
        self._up = self._down.new_zeros(max(ranks), sum(outs))
        blocks: list[tuple[int, int, int]] = []
        firsts = zip(accumulate(outs, initial=0), accumulate(ranks, initial=0), factors, strict=False)
        for column, rank, (_, up) in firsts:
            self._up[: up.shape[1], column : column + len(up)] = up.T
            ends = range(0, len(up), self.WIDTH)
            blocks += [(column + start, min(self.WIDTH, len(up) - start), rank) for start in ends]
        self._blocks = torch.tensor(blocks)

    def add(self, x: Float[Tensor, "rows width"], y: Float[Tensor, "rows outs"]) -> None:
        """Add them to y, which is dense; x of the same dtype."""
        x, (rows, outs), (ranks, width) = x.contiguous(), y.shape, self._down.shape
        low = self._down.new_empty(rows, ranks)
        items = ranks // self.TOGETHER
        call("lower", x.dtype, items, (x, self._down, low), (rows, width, ranks), size=self.TOGETHER * rows * width)
        of = (rows, outs, ranks, len(self._up))
        one = rows * len(self._up) * self.WIDTH
        call("raise", x.dtype, len(self._blocks), (y, low, self._up, self._blocks), of, size=one)
