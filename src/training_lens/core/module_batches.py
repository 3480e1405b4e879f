"""Modules of one shape as one stack, so that a measure is one batched call for each shape and not one for a module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training_lens.core.modules import AdapterModule


class Factors(NamedTuple):
    """A (modules, rank, in) and B (modules, out, rank) of modules of one shape, or their gradients; float32.

    `magnitude` (modules, out) is DoRA's, None without.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """The positions of modules whose shapes, parts, scaling and device are the same."""

    positions: tuple[int, ...]
    modules: tuple[AdapterModule, ...]
    scaling: float

    def weights(self) -> Factors:
        """What trains, copied."""
        return self._factors(lambda parameter: parameter)

    def gradients(self, of: Callable[[torch.nn.Parameter], Tensor | None]) -> Factors:
        """Copied; zero where a parameter has none."""
        return self._factors(lambda parameter: _or_zero(parameter, of))

    def _factors(self, of: Callable[[torch.nn.Parameter], Tensor]) -> Factors:
        magnitudes = [of(m.magnitude) for m in self.modules if m.magnitude is not None]
        return Factors(
            _stacked([of(m.a) for m in self.modules]),
            _stacked([of(m.b) for m in self.modules]),
            _stacked(magnitudes) if magnitudes else None,
        )

    def whole(self, trained: Factors) -> Factors:
        """The factors of dW: with the frozen halves of PiSSA, and else what trains."""
        if self.modules[0].frozen_a is None:
            return trained
        a = _stacked([m.frozen_a for m in self.modules if m.frozen_a is not None])
        b = _stacked([m.frozen_b for m in self.modules if m.frozen_b is not None])
        return Factors(torch.cat([trained.a, a], 1), torch.cat([trained.b, b], 2), trained.magnitude)


class Groups:
    """The modules in groups of one shape, and the way back to their order."""

    def __init__(self, modules: Sequence[AdapterModule]) -> None:
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, m in enumerate(modules):
            parts = (m.frozen_a is None, m.magnitude is None)
            alike[m.a.shape, m.b.shape, m.record.scaling, parts, m.a.device].append(i)
        self._groups = [
            Group(tuple(where), tuple(modules[i] for i in where), modules[where[0]].record.scaling)
            for where in alike.values()
        ]
        self._back = torch.tensor([i for group in self._groups for i in group.positions]).argsort()

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """(modules,) in the model's order, from one (modules of the group,) for each group. No synchronisation."""
        device = parts[0].device
        if self._back.device != device:
            self._back = self._back.to(device, non_blocking=True)
        return torch.cat([part.to(device, non_blocking=True) for part in parts])[self._back]

    def joined_all(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Several measures, joined each: `parts` has those of each group, and NaN stands for one that a group lacks."""
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: self.joined([_or_unknown(part, name) for part in parts]) for name in names}


def _or_unknown(part: Mapping[str, Tensor], name: str) -> Tensor:
    return part[name] if name in part else torch.full_like(next(iter(part.values())), torch.nan)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach() for t in tensors]).float()


def _or_zero(parameter: torch.nn.Parameter, of: Callable[[torch.nn.Parameter], Tensor | None]) -> Tensor:
    found = of(parameter)
    return torch.zeros_like(parameter) if found is None else found
