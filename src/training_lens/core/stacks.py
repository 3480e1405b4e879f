"""Modules of one shape as one stack, so that a measure is one batched call for each shape and not one for a module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training_lens.core.modules import AdapterModule


class Factors(NamedTuple):
    """A (modules, rank, in) and B (modules, out, rank) of modules of one shape, or their gradients; float32."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Group:
    """The positions of modules whose shapes, scaling and device are the same."""

    positions: tuple[int, ...]
    modules: tuple[AdapterModule, ...]
    scaling: float

    def weights(self) -> Factors:
        """What trains, copied."""
        return Factors(_stacked([m.a for m in self.modules]), _stacked([m.b for m in self.modules]))

    def gradients(self, of: Callable[[torch.nn.Parameter], Tensor | None]) -> Factors:
        """Copied; zero where a parameter has none."""
        return Factors(
            _stacked([_or_zero(m.a, of) for m in self.modules]), _stacked([_or_zero(m.b, of) for m in self.modules])
        )

    def whole(self, trained: Factors) -> Factors:
        """The factors of dW: with the frozen halves of PiSSA, and else what trains."""
        if self.modules[0].frozen_a is None:
            return trained
        a = _stacked([m.frozen_a for m in self.modules if m.frozen_a is not None])
        b = _stacked([m.frozen_b for m in self.modules if m.frozen_b is not None])
        return Factors(torch.cat([trained.a, a], 1), torch.cat([trained.b, b], 2))


class Groups:
    """The modules in groups of one shape, and the way back to their order."""

    def __init__(self, modules: Sequence[AdapterModule]) -> None:
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, m in enumerate(modules):
            alike[m.a.shape, m.b.shape, m.record.scaling, m.frozen_a is None, m.a.device].append(i)
        self._groups = [
            Group(tuple(where), tuple(modules[i] for i in where), modules[where[0]].record.scaling)
            for where in alike.values()
        ]
        self._back = torch.tensor([i for group in self._groups for i in group.positions]).argsort()

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._groups)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """(modules,) in the model's order, from one (modules of the group,) for each group. No synchronisation."""
        device = parts[0].device
        if self._back.device != device:
            self._back = self._back.to(device, non_blocking=True)
        return torch.cat([part.to(device, non_blocking=True) for part in parts])[self._back]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach() for t in tensors]).float()


def _or_zero(parameter: torch.nn.Parameter, of: Callable[[torch.nn.Parameter], Tensor | None]) -> Tensor:
    found = of(parameter)
    return torch.zeros_like(parameter) if found is None else found
