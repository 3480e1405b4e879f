"""What Adam makes of the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Captured, DataType
from training_lens.measures.directions import adam_update_rms
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


@CollectorRegistry.register
class OptimizerStateCollector(DataCollector):
    """How far the gradients that Adam took outgrow its second moments (table `optimizer_state`).

    The gradients are the clipped ones, as the optimizer had them. A parameter that Adam does not step, or has not yet,
    has NaN.
    Nothing is captured, and that is said once, of an optimizer that keeps no float `exp_avg_sq` of a parameter's shape
    (8-bit ones, Adafactor, SGD) or whose parameter groups differ in eps.

    Cost: two copies of the adapter's size for a moment, no synchronisation.
    """

    name, data_type = tables.OPTIMIZER, DataType.OPTIMIZER_STATE

    def start(self, watched: Watched) -> None:
        """Of a new run, what cannot be captured is said again."""
        self._told = False

    def collect(self, watched: Watched, step: int) -> Captured | None:
        """Right after the optimizer's step, while gradients still stand."""
        adam = _adam(watched)
        if adam is None:
            self._tell(watched)
            return None
        parts = [
            {
                "update_rms_a": adam.update_rms([m.a for m in group.modules]),
                "update_rms_b": adam.update_rms([m.b for m in group.modules]),
            }
            for group in watched.groups
        ]
        return Captured(watched.groups.joined_all(parts), rows=watched.names)

    def _tell(self, watched: Watched) -> None:
        if not self._told:
            self._told = True
            kind = type(watched.optimizer).__name__ if watched.optimizer else "no optimizer"
            logger.info("the lens captures no %s: %s keeps no float exp_avg_sq with one eps", self.name, kind)


@dataclass(frozen=True)
class _Adam:
    """An optimizer's state of each parameter, its group by the parameter's id, and the eps that these share."""

    state: Mapping[Tensor, Mapping[str, Any]]
    groups: Mapping[int, Mapping[str, Any]]
    eps: float

    def update_rms(self, parameters: Sequence[Tensor]) -> Tensor:
        """(parameters,), of parameters of one shape; NaN for one without a gradient or a state."""
        gradients = torch.stack([_or_unknown(p.grad, p) for p in parameters])
        moments = torch.stack([_or_unknown(self.state.get(p, {}).get("exp_avg_sq"), p) for p in parameters])
        moments = moments.float().div_(self._bias(parameters).to(moments.device, non_blocking=True)[:, None, None])
        return adam_update_rms(gradients, moments, self.eps)

    def _bias(self, parameters: Sequence[Tensor]) -> Tensor:
        """1 - beta2^t of each, (parameters,)."""
        steps = torch.stack([torch.as_tensor(self.state.get(p, {}).get("step", 1)) for p in parameters]).float()
        unstepped = {"betas": (0.0, 0.0)}  # of which no moment is known either
        betas = torch.tensor([self.groups.get(id(p), unstepped)["betas"][1] for p in parameters])
        betas = betas.to(steps.device, non_blocking=True)
        return -torch.expm1(steps * betas.log())  # exact where beta2^t is close to 1


def _or_unknown(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan) if tensor is None else tensor


def _adam(watched: Watched) -> _Adam | None:
    """The optimizer, read as Adam; None where it is another, or steps nothing of the adapter."""
    if watched.optimizer is None:
        return None
    of = {id(p): group for group in watched.optimizer.param_groups for p in group["params"]}
    trained = [p for module in watched.modules for p in (module.a, module.b) if id(p) in of]
    if not all("betas" in of[id(p)] and "eps" in of[id(p)] for p in trained):
        return None
    state, eps = watched.optimizer.state, {of[id(p)]["eps"] for p in trained}
    stepped = [p for p in trained if state.get(p)]
    if len(eps) > 1 or not stepped or not all(_has_second_moment(p, state[p]) for p in stepped):
        return None
    return _Adam(state, of, eps.pop())


def _has_second_moment(parameter: Tensor, state: Mapping[str, Any]) -> bool:
    moment = state.get("exp_avg_sq")
    return "step" in state and moment is not None and moment.is_floating_point() and moment.shape == parameter.shape
