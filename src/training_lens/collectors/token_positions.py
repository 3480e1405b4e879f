"""Which tokens of a batch are looked at: real ones, and few enough to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 256  # positions of one batch


@dataclass(frozen=True)
class Positions:
    """At most `MOST` real positions of a batch, evenly spread over all of them; the same whenever it is asked.

    `index` (n,) counts positions row by row; `shape` is the batch's (rows, width).
    """

    index: Tensor
    shape: tuple[int, int]

    @classmethod
    def of_mask(cls, real: Tensor) -> Positions:
        """Those of a (rows, width) mask that is true where there is no padding. Waits for the device."""
        rows, width = real.shape
        return cls(_spread(real.flatten().nonzero()[:, 0]), (rows, width))

    def of(self, states: Tensor) -> Tensor:
        """(n, features), of (rows, width, features) or (rows * width, features).

        In another arrangement, such as the tokens that one expert of several gets, padding cannot be told: then it is
        at most `MOST` of all.
        """
        return self._chosen(states.reshape(-1, states.shape[-1]))

    def of_ids(self, ids: Tensor) -> Tensor:
        """(n,), of token ids (rows, width); in another arrangement as in `of`."""
        return self._chosen(ids.reshape(-1))

    def _chosen(self, flat: Tensor) -> Tensor:
        rows, width = self.shape
        if len(flat) == rows * width:
            return flat[self.index.to(flat.device)]
        return flat[_spread(torch.arange(len(flat), device=flat.device))]


def _spread(index: Tensor, most: int = MOST) -> Tensor:
    """At most `most` of them, evenly."""
    if len(index) <= most:
        return index
    return index[torch.arange(most, device=index.device) * len(index) // most]
