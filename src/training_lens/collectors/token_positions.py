"""Which tokens of a batch activations are measured at: real ones, and few enough to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_POSITIONS = 256  # of one batch


@dataclass(frozen=True)
class TokenPositions:
    """At most `MAX_POSITIONS` real positions of a batch, evenly spread; the same at each call.

    `index` (n,) counts positions row by row; `shape` is the batch's (rows, width).
    """

    index: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> TokenPositions:
        """From a (rows, width) mask that is true where there is no padding. Waits for the device."""
        rows, width = attention_mask.shape
        return cls(_spread_evenly(attention_mask.flatten().nonzero()[:, 0]), (rows, width))

    def select_states(self, states: Tensor) -> Tensor:
        """(n, features), from (rows, width, features) or (rows * width, features).

        In any other layout, such as the tokens routed to one expert, padding cannot be recognized: then up to
        `MAX_POSITIONS` of all positions.
        """
        return self._select_flat(states.reshape(-1, states.shape[-1]))

    def select_ids(self, ids: Tensor) -> Tensor:
        """(n,), from token ids (rows, width); in any other layout as in `select_states`."""
        return self._select_flat(ids.reshape(-1))

    def _select_flat(self, flat: Tensor) -> Tensor:
        rows, width = self.shape
        if len(flat) == rows * width:
            return flat[self.index.to(flat.device)]
        return flat[_spread_evenly(torch.arange(len(flat), device=flat.device))]


def _spread_evenly(index: Tensor) -> Tensor:
    """At most `MAX_POSITIONS` of an index, evenly."""
    if len(index) <= MAX_POSITIONS:
        return index
    return index[torch.arange(MAX_POSITIONS, device=index.device) * len(index) // MAX_POSITIONS]
