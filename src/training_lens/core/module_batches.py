"""Modules of one shape as one batch, so that a measure is one call for each shape and not one for each module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training_lens.core.modules import AdapterModule
from training_lens.measures.factors import Factors
from training_lens.utils.devices import move_to_device, move_to_one_device

GradientGetter = Callable[[torch.nn.Parameter], Tensor | None]


@dataclass(frozen=True)
class ModuleBatch:
    """Modules of one shape, scaling and device, with their positions in the model's order."""

    positions: tuple[int, ...]
    modules: tuple[AdapterModule, ...]
    scaling: float

    def copy_weights(self) -> Factors:
        """The trained factors, copied."""
        return self._copy_factors(lambda parameter: parameter)

    def copy_gradients(self, gradient_of: GradientGetter) -> Factors:
        """The factors' gradients, copied; zeros where a parameter has none."""

        def copy_gradient(parameter: torch.nn.Parameter) -> Tensor:
            gradient = gradient_of(parameter)
            return torch.zeros_like(parameter) if gradient is None else gradient

        return self._copy_factors(copy_gradient)

    def _copy_factors(self, tensor_of: Callable[[torch.nn.Parameter], Tensor]) -> Factors:
        magnitudes = [tensor_of(m.magnitude) for m in self.modules if m.magnitude is not None]
        return Factors(
            stack_float32(tensor_of(m.a) for m in self.modules),
            stack_float32(tensor_of(m.b) for m in self.modules),
            stack_float32(magnitudes) if magnitudes else None,
        )

    def full_factors(self, trained: Factors) -> Factors:
        """The factors of dW: those that train, and for PiSSA the frozen halves too."""
        if self.modules[0].frozen_a is None:
            return trained
        a = stack_float32(m.frozen_a for m in self.modules if m.frozen_a is not None)
        b = stack_float32(m.frozen_b for m in self.modules if m.frozen_b is not None)
        return Factors(torch.cat([trained.a, a], 1), torch.cat([trained.b, b], 2), trained.magnitude)


class ModuleBatches:
    """The modules in batches of one shape, and the way back to the model's order."""

    def __init__(self, modules: Sequence[AdapterModule]) -> None:
        positions_by_shape: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, m in enumerate(modules):
            parts = (m.frozen_a is None, m.magnitude is None)
            positions_by_shape[m.a.shape, m.b.shape, m.record.scaling, parts, m.a.device].append(i)
        self._batches = [
            ModuleBatch(tuple(positions), tuple(modules[i] for i in positions), modules[positions[0]].record.scaling)
            for positions in positions_by_shape.values()
        ]
        self._order = torch.tensor([i for batch in self._batches for i in batch.positions]).argsort()

    def __iter__(self) -> Iterator[ModuleBatch]:
        return iter(self._batches)

    def restore_order(self, parts: Sequence[Tensor]) -> Tensor:
        """(modules,) in the model's order, from (modules of the batch,) for each batch. Does not synchronise."""
        values = torch.cat(move_to_one_device(parts))
        if self._order.device != values.device:
            self._order = move_to_device(self._order, values.device)
        return values[self._order]

    def restore_order_all(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`restore_order` for each measure; `parts` has those of each batch. NaN where a batch lacks a measure."""
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: self.restore_order([_measure_or_nan(part, name) for part in parts]) for name in names}


def _measure_or_nan(part: Mapping[str, Tensor], name: str) -> Tensor:
    return part[name] if name in part else torch.full_like(next(iter(part.values())), torch.nan)


def stack_float32(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of one shape as one float32 tensor with a leading dimension, detached."""
    return torch.stack([tensor.detach() for tensor in tensors]).float()
