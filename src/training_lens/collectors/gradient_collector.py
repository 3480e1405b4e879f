"""The adapter's gradients: norms, directions, the proof of a correct capture, and Adam's second moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, CollectorRegistry, DataCollector
from training_lens.core.modules import stack_experts
from training_lens.core.types import Captured, DataType, Moment
from training_lens.measures.directions import adam_update_rms, self_check
from training_lens.measures.factors import Factors, frobenius
from training_lens.models.experts import split_a, split_b
from training_lens.utils.devices import move_to_device, move_to_one_device
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
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


@CollectorRegistry.register
class OptimizerStateCollector(DataCollector):
    """How far gradients exceed Adam's second moments (table `optimizer_state`).

    The gradients are the clipped ones that the optimizer took. NaN for a parameter that Adam does not step, or has not
    stepped yet. Nothing is captured, which is logged once, if the optimizer keeps no float `exp_avg_sq` of a
    parameter's shape (8-bit optimizers, Adafactor, SGD) or if its parameter groups differ in eps.

    Cost: two temporary copies of the adapter's size; no synchronisation.
    """

    name, data_type = tables.OPTIMIZER, DataType.OPTIMIZER_STATE

    def start(self, context: CaptureContext) -> None:
        """A new run logs again what cannot be captured."""
        self._has_logged = False

    def collect(self, context: CaptureContext, step: int) -> Captured | None:
        """Measure right after the optimizer's step, before gradients are zeroed."""
        adam = _read_adam_state(context)
        if adam is None:
            if not self._has_logged:
                self._has_logged = True
                kind = type(context.optimizer).__name__ if context.optimizer else "no optimizer"
                logger.info("the lens captures no %s: %s keeps no float exp_avg_sq with one eps", self.name, kind)
            return None
        parts = []
        for batch in context.batches:
            (a, b), experts = batch.parameters(), batch.modules[0].experts
            rms_a, rms_b = adam.update_rms(a, experts, split_a), adam.update_rms(b, experts, split_b)
            parts.append({"update_rms_a": rms_a, "update_rms_b": rms_b})
        return Captured(context.batches.restore_order_all(parts), rows=context.module_names)


@dataclass(frozen=True)
class _AdamState:
    """An optimizer's state of each parameter, its parameter group by the parameter's id, and the groups' eps."""

    state: Mapping[Tensor, Mapping[str, Any]]
    groups: Mapping[int, Mapping[str, Any]]
    eps: float

    def update_rms(self, parameters: Sequence[Tensor], experts: int, split: Callable[[Tensor, int], Tensor]) -> Tensor:
        """(modules,), for parameters of one shape, each of so many experts; NaN without a gradient or a state."""
        own = [_tensor_or_nan(self.state.get(p, {}).get("exp_avg_sq"), p) for p in parameters]
        moments = stack_experts(own, experts, split)
        gradients = stack_experts((_tensor_or_nan(p.grad, p) for p in parameters), experts, split)
        # Adam's own step counts are on the CPU, those of its fused form on the parameters' device.
        counts = move_to_one_device(torch.as_tensor(self.state.get(p, {}).get("step", 1)).float() for p in parameters)
        unstepped = {"betas": (0.0, 0.0)}  # any value: these parameters have no moment either
        betas = torch.tensor([self.groups.get(id(p), unstepped)["betas"][1] for p in parameters])
        steps, betas = torch.stack(counts).repeat_interleave(experts), betas.repeat_interleave(experts)
        corrections = -torch.expm1(steps * move_to_device(betas.log(), steps.device))  # 1 - beta2^t, exact close to 1
        moments = moments.div_(move_to_device(corrections, moments.device)[:, None, None])
        return adam_update_rms(gradients, moments, self.eps)


def _tensor_or_nan(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan) if tensor is None else tensor


def _read_adam_state(context: CaptureContext) -> _AdamState | None:
    """The optimizer's state as Adam's; None if it is another optimizer, or steps nothing of the adapter."""
    if context.optimizer is None:
        return None
    group_of = {id(p): group for group in context.optimizer.param_groups for p in group["params"]}
    trained = [p for module in context.modules for p in (module.a, module.b) if id(p) in group_of]
    if not all("betas" in group_of[id(p)] and "eps" in group_of[id(p)] for p in trained):
        return None
    state, eps = context.optimizer.state, {group_of[id(p)]["eps"] for p in trained}
    stepped = [p for p in trained if state.get(p)]
    if len(eps) > 1 or not stepped or not all(_has_second_moment(p, state[p]) for p in stepped):
        return None
    return _AdamState(state, group_of, eps.pop())


def _has_second_moment(parameter: Tensor, state: Mapping[str, Any]) -> bool:
    moment = state.get("exp_avg_sq")
    return "step" in state and moment is not None and moment.is_floating_point() and moment.shape == parameter.shape
