"""What the adapter's gradients are: how large, where they point, and whether the capture of them is right."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from training_lens.analyzers.directions import cosine, self_check
from training_lens.core import tables
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.registry import CollectorRegistry
from training_lens.core.stacks import Factors
from training_lens.core.types import Captured, DataType, Moment

DECAY = 0.9  # of the running mean of gradients


@CollectorRegistry.register
class AdapterGradientsCollector(DataCollector):
    """Norms and directions of each module's gradient, and the self-check (table `adapter_gradients`).

    Cosines are NaN where there is nothing to compare with: after a step without a gradient, and at the first step, also
    of a resumed run, where the running mean begins anew. A gradient that is not finite gives NaN there, and does not
    enter the running mean.

    Cost: some twenty passes over the adapter's gradients, no synchronisation; memory of twice the adapter in float32,
    for the gradient of the step before and for the running mean.
    """

    name, data_type, moment = tables.GRADIENTS, DataType.ADAPTER_GRADIENTS, Moment.GRADIENTS

    def start(self, watched: Watched) -> None:
        """Forget the gradients of another run."""
        self._directions = [_Directions() for _ in watched.groups]

    def collect(self, watched: Watched, step: int) -> Captured:
        """Of the step's gradients, before clipping."""
        parts = []
        for weights, gradients, directions in zip(watched.before, watched.gradients, self._directions, strict=True):
            parts.append(_measures(weights, gradients) | directions.turn(gradients))
        return Captured(watched.groups.joined_all(parts), rows=watched.names)


def _measures(weights: Factors, gradients: Factors) -> dict[str, Tensor]:
    """Each (modules of the group,)."""
    found = {
        "norm_a": vector_norm(gradients.a, dim=(1, 2)),
        "norm_b": vector_norm(gradients.b, dim=(1, 2)),
        "self_check": self_check(weights.a, weights.b, gradients.a, gradients.b),
    }
    if gradients.magnitude is not None:
        found["norm_magnitude"] = vector_norm(gradients.magnitude, dim=1)
    return found


class _Directions:
    """Where the gradients of one group's modules have pointed so far."""

    def __init__(self) -> None:
        self._previous: Tensor | None = None  # (modules, numbers of A and B)
        self._mean: Tensor | None = None

    def turn(self, gradients: Factors) -> dict[str, Tensor]:
        """Cosines of these gradients with the earlier ones, each (modules,), and then they are among these."""
        now = torch.cat([gradients.a.flatten(1), gradients.b.flatten(1)], 1)
        if self._previous is None or self._mean is None:
            self._previous, self._mean = torch.zeros_like(now), torch.zeros_like(now)  # of which cosines are NaN
        found = {"cosine_previous": cosine(now, self._previous, 1), "cosine_mean": cosine(now, self._mean, 1)}
        finite = now.isfinite().all(1, keepdim=True)  # (modules, 1)
        self._mean.lerp_(torch.where(finite, now, self._mean), 1 - DECAY)
        self._previous = now
        return found
