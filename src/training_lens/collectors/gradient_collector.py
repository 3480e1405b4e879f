"""The adapter's gradients: their norms, their directions, and the proof that they were captured correctly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Captured, DataType, Moment
from training_lens.measures.directions import self_check
from training_lens.measures.factors import Factors, frobenius

DECAY = 0.9  # of the running mean of gradients


@CollectorRegistry.register
class AdapterGradientsCollector(DataCollector):
    """Norms and directions of each module's gradient, and the self-check (table `adapter_gradients`).

    Cosines are NaN where there is nothing to compare with: after a step without a gradient, and at the first step, also
    of a resumed run, where the running mean restarts. A gradient that is not finite gives NaN, and is left out of the
    running mean.

    Cost: about twelve passes over the adapter's gradients, no synchronisation; memory of twice the adapter in float32,
    for the previous gradient and for the running mean.
    """

    name, data_type, moment = tables.GRADIENTS, DataType.ADAPTER_GRADIENTS, Moment.GRADIENTS

    def start(self, context: CaptureContext) -> None:
        """Drop the gradients of an earlier run."""
        self._histories = [_GradientHistory() for _ in context.batches]

    def collect(self, context: CaptureContext, step: int) -> Captured:
        """Measure the step's gradients before clipping."""
        parts = []
        for weights, gradients, history in zip(context.before, context.gradients, self._histories, strict=True):
            norms = frobenius(gradients.a), frobenius(gradients.b)
            cosines = history.compare_and_add(gradients, torch.hypot(*norms))
            parts.append(_measure_gradients(weights, gradients, norms) | cosines)
        return Captured(context.batches.restore_order_all(parts), rows=context.module_names)


def _measure_gradients(weights: Factors, gradients: Factors, norms: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Each (modules of the batch,); `norms` are those of A's and B's gradient."""
    found = {
        "norm_a": norms[0],
        "norm_b": norms[1],
        "self_check": self_check(weights.a, weights.b, gradients.a, gradients.b, norms),
    }
    if gradients.magnitude is not None:
        found["norm_magnitude"] = vector_norm(gradients.magnitude, dim=1)
    return found


class _GradientHistory:
    """The previous gradient of one batch's modules, and the running mean of all."""

    def __init__(self) -> None:
        self._previous: Factors | None = None
        self._previous_norm: Tensor | None = None  # (modules,), of A and B together
        self._mean: Factors | None = None

    def compare_and_add(self, gradients: Factors, norm: Tensor) -> dict[str, Tensor]:
        """cosine_previous and cosine_mean, each (modules,); then add the gradients, whose norm is `norm`.

        A and B count as one vector, without being copied into one.
        """
        previous, previous_norm, mean = self._previous, self._previous_norm, self._mean
        if previous is None or previous_norm is None or mean is None:
            mean = self._mean = Factors(torch.zeros_like(gradients.a), torch.zeros_like(gradients.b))
            previous, previous_norm = mean, torch.zeros_like(norm)  # cosines with zeros are NaN
        mean_norm = torch.hypot(frobenius(mean.a), frobenius(mean.b))
        cosines = {
            "cosine_previous": _inner_product(gradients, previous) / norm / previous_norm,
            "cosine_mean": _inner_product(gradients, mean) / norm / mean_norm,
        }
        finite = norm.isfinite()[:, None, None]  # (modules, 1, 1)
        mean.a.lerp_(torch.where(finite, gradients.a, mean.a), 1 - DECAY)
        mean.b.lerp_(torch.where(finite, gradients.b, mean.b), 1 - DECAY)
        self._previous, self._previous_norm = gradients, norm
        return cosines


def _inner_product(x: Factors, y: Factors) -> Tensor:
    """(modules,), of A and B as one vector."""
    return (x.a * y.a).sum((1, 2)) + (x.b * y.b).sum((1, 2))
