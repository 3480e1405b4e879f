"""What decoding computes by a kernel in C; `calls.can_take` says whether it takes a tensor."""

from __future__ import annotations

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
