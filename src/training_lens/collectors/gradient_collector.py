"""What the adapter's gradients are: how large, where they point, and whether the capture of them is right."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from training_lens.core import table_names as tables
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.module_batches import Factors
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Captured, DataType, Moment
from training_lens.measures.directions import self_check
from training_lens.measures.factors import frobenius

DECAY = 0.9  # of the running mean of gradients


@CollectorRegistry.register
class AdapterGradientsCollector(DataCollector):
    """Norms and directions of each module's gradient, and the self-check (table `adapter_gradients`).

    Cosines are NaN where there is nothing to compare with: after a step without a gradient, and at the first step, also
    of a resumed run, where the running mean begins anew. A gradient that is not finite gives NaN there, and does not
    enter the running mean.

    Cost: some twelve passes over the adapter's gradients, no synchronisation; memory of twice the adapter in float32,
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
            norms = frobenius(gradients.a), frobenius(gradients.b)
            parts.append(_measures(weights, gradients, norms) | directions.turn(gradients, torch.hypot(*norms)))
        return Captured(watched.groups.joined_all(parts), rows=watched.names)


def _measures(weights: Factors, gradients: Factors, norms: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Each (modules of the group,); `norms` are those of A's and B's gradient."""
    found = {
        "norm_a": norms[0],
        "norm_b": norms[1],
        "self_check": self_check(weights.a, weights.b, gradients.a, gradients.b, norms),
    }
    if gradients.magnitude is not None:
        found["norm_magnitude"] = vector_norm(gradients.magnitude, dim=1)
    return found


class _Directions:
    """Where the gradients of one group's modules have pointed so far."""

    def __init__(self) -> None:
        self._previous: Factors | None = None
        self._previous_norm: Tensor | None = None  # (modules,), of A and B together
        self._mean: Factors | None = None

    def turn(self, gradients: Factors, norm: Tensor) -> dict[str, Tensor]:
        """Cosines of these gradients, of this norm, with the earlier ones, and then they are among these.

        Each (modules,). A and B are one vector, but are not copied into one.
        """
        previous, previous_norm, mean = self._previous, self._previous_norm, self._mean
        if previous is None or previous_norm is None or mean is None:
            mean = self._mean = Factors(torch.zeros_like(gradients.a), torch.zeros_like(gradients.b))
            previous, previous_norm = mean, torch.zeros_like(norm)  # cosines with zeros are NaN
        mean_norm = torch.hypot(frobenius(mean.a), frobenius(mean.b))
        found = {
            "cosine_previous": _product(gradients, previous) / norm / previous_norm,
            "cosine_mean": _product(gradients, mean) / norm / mean_norm,
        }
        finite = norm.isfinite()[:, None, None]  # (modules, 1, 1)
        mean.a.lerp_(torch.where(finite, gradients.a, mean.a), 1 - DECAY)
        mean.b.lerp_(torch.where(finite, gradients.b, mean.b), 1 - DECAY)
        self._previous, self._previous_norm = gradients, norm
        return found


def _product(x: Factors, y: Factors) -> Tensor:
    """(modules,), the inner product of A and B as one vector."""
    return (x.a * y.a).sum((1, 2)) + (x.b * y.b).sum((1, 2))
