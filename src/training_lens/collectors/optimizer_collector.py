"""Adam's second moments against the gradients that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Captured, DataType
from training_lens.measures.directions import adam_update_rms
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


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
            self._log_unsupported(context)
            return None
        parts = [
            {
                "update_rms_a": adam.update_rms([m.a for m in batch.modules]),
                "update_rms_b": adam.update_rms([m.b for m in batch.modules]),
            }
            for batch in context.batches
        ]
        return Captured(context.batches.restore_order_all(parts), rows=context.module_names)

    def _log_unsupported(self, context: CaptureContext) -> None:
        if not self._has_logged:
            self._has_logged = True
            kind = type(context.optimizer).__name__ if context.optimizer else "no optimizer"
            logger.info("the lens captures no %s: %s keeps no float exp_avg_sq with one eps", self.name, kind)


@dataclass(frozen=True)
class _AdamState:
    """An optimizer's state of each parameter, its parameter group by the parameter's id, and the groups' eps."""

    state: Mapping[Tensor, Mapping[str, Any]]
    groups: Mapping[int, Mapping[str, Any]]
    eps: float

    def update_rms(self, parameters: Sequence[Tensor]) -> Tensor:
        """(parameters,), for parameters of one shape; NaN for one without a gradient or a state."""
        gradients = torch.stack([_tensor_or_nan(p.grad, p) for p in parameters])
        moments = torch.stack([_tensor_or_nan(self.state.get(p, {}).get("exp_avg_sq"), p) for p in parameters])
        corrections = self._bias_corrections(parameters).to(moments.device, non_blocking=True)
        moments = moments.float().div_(corrections[:, None, None])
        return adam_update_rms(gradients, moments, self.eps)

    def _bias_corrections(self, parameters: Sequence[Tensor]) -> Tensor:
        """1 - beta2^t of each parameter, (parameters,)."""
        steps = torch.stack([torch.as_tensor(self.state.get(p, {}).get("step", 1)) for p in parameters]).float()
        unstepped = {"betas": (0.0, 0.0)}  # any value: these parameters have no moment either
        betas = torch.tensor([self.groups.get(id(p), unstepped)["betas"][1] for p in parameters])
        betas = betas.to(steps.device, non_blocking=True)
        return -torch.expm1(steps * betas.log())  # exact where beta2^t is close to 1


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
