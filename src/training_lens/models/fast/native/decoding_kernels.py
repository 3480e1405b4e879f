"""What decoding computes by kernels in C; `library.can_compute` says whether they take a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from training_lens.models.fast.native.attention_kernels import ScoreSpec
from training_lens.models.fast.native.library import GRAIN, can_compute, define_call, has_kernel, run_kernel

MOST_LAYERS = 8  # of products.h


AttendNewestCall = define_call(
    "attend_newest",
    pointers="query key value cosine sine keys values bounds ends y",
    sizes="heads groups size angles interleaved most window "
    "query_stride key_stride value_stride cache_row_stride cache_group_stride",
    numbers="scale softcap",
)
FewRowsCall = define_call("few_rows", f"x y firsts bias weights[{MOST_LAYERS}]", "rows width outs layers")
BranchesCall = define_call("branches", "x y down up block_info", "rows width outs ranks blocks rank panel")


def attend_newest_tokens(
    heads: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    interleaved: bool,
    layer: Any,
    scores: ScoreSpec,
) -> Float[Tensor, "tokens heads size"]:
    """Write the tokens of a step into a KV cache, and give softmax(s) v of each; `ScoreSpec` defines s.

    Queries and keys are rotated first. Keys and values are read once for all heads that share them, and only columns
    that a token sees. Its result is the same to the bit whatever tokens are beside and before it in the step.

    Args:
        heads: query, key and value, (tokens, heads or groups, size), a token's heads adjacent.
        angles: cosines and sines of `apply_rotary`, (tokens, rotated), dense; `rotated` 0: none is rotated.
        layer: a `kv_cache.SlotLayer`, whose `columns` say which tokens of the step are whose.
    """
    query, key, value = heads
    keys, values = layer.allocate(key, value)  # (slots, groups, columns, size)
    (_, head_count, size), (slots, groups), columns = query.shape, keys.shape[:2], layer.columns
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    call = AttendNewestCall(
        query=query, key=key, value=value, cosine=angles[0], sine=angles[1], keys=keys, values=values,
        bounds=columns.bounds, ends=columns.ends, y=out, heads=head_count, groups=groups, size=size,
        angles=angles[0].shape[-1], interleaved=interleaved, most=columns.end, window=scores.window or 0,
        query_stride=query.stride(0), key_stride=key.stride(0), value_stride=value.stride(0),
        cache_row_stride=keys.stride(0), cache_group_stride=keys.stride(1), scale=scores.scale,
        softcap=scores.softcap or 0.0,
    )  # fmt: skip
    most = 2 * (head_count // groups) * size * columns.end * columns.most  # products of an item, of the largest one
    run_kernel(call, query.dtype, slots * groups, min(most, GRAIN))
    return out


class FewRowsLinear:
    """x W^T + b of layers on one input whose outputs lie side by side, from their plain weights, for few rows.

    Bound by the memory that the weights are read from, where oneDNN's kernels are made for many rows. A row's result is
    the same whatever rows are beside it. Weights (out, width) and bias (sum of outs,) are as `can_compute` wants them.
    """

    MOST = 64  # rows; more are better left to oneDNN
    OUTS, WIDTH = 4, 32  # multiples of what products.h takes

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        self._weights, self._bias = tuple(weights), bias
        *firsts, self._outs = accumulate(map(len, weights), initial=0)
        self._firsts = torch.tensor(firsts)
        self._addresses = (ctypes.c_void_p * MOST_LAYERS)(*(weight.data_ptr() for weight in weights))

    @classmethod
    def can_compute(cls, weights: Sequence[Tensor], bias: Tensor | None) -> bool:
        """Whether there is a kernel for them on this processor."""
        tensors = [*weights] if bias is None else [*weights, bias]
        kernel = len(weights) <= MOST_LAYERS and can_compute(*tensors) and has_kernel("few_rows", weights[0].dtype)
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
        call = FewRowsCall(
            x=x.contiguous(), y=y, firsts=self._firsts, bias=self._bias, weights=self._addresses, rows=rows,
            width=width, outs=self._outs, layers=len(self._weights),
        )  # fmt: skip
        run_kernel(call, dtype, self._outs // self.OUTS, self.OUTS * width * rows)
        return y


class LoRABranches:
    """The low-rank branches of layers whose outputs lie side by side: y += (x A^T) B^T, for some rows.

    In the dtype of sums until y is rounded, as PEFT computes beside weights of fewer bits. The factors of each layer
    are A (rank, width) and B (out, rank), B with the adapter's scale.
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
        call = BranchesCall(
            x=x.contiguous(), y=y, down=self._down, up=self._up, block_info=self._blocks, rows=rows, width=width,
            outs=outs, ranks=ranks, blocks=blocks, rank=rank, panel=panel,
        )  # fmt: skip
        run_kernel(call, x.dtype, -(-rows // panel), panel * (ranks * width + rank * outs))
