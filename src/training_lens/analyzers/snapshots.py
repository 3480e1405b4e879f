"""Saved factors of many modules: out of a recording, and as stacks of one shape, so that a measure is a few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training_lens.core import tables
from training_lens.core.recording import Recording
from training_lens.core.stacks import Factors
from training_lens.core.types import ModuleRecord


@dataclass(frozen=True)
class Stack:
    """A (modules, rank, in) and B (modules, out, rank), float32, of modules of one shape and scaling, with their names.

    dW of each is `scaling` B A.
    """

    names: tuple[str, ...]
    scaling: float
    a: Tensor
    b: Tensor


def snapshot_factors(recording: Recording, step: int) -> dict[str, Factors]:
    """A and B of each module of a snapshot; of PiSSA with the frozen halves, so that dW is always scaling B A.

    Raises:
        LensError: there is no snapshot of that step, or it is damaged.
    """
    tensors = recording.captures.snapshot(tables.SNAPSHOTS, step)
    names = [record.name for record in recording.modules]
    return {name: Factors(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names if f"{name}.a" in tensors}


def stacks(records: Sequence[ModuleRecord], factors: Mapping[str, Factors]) -> list[Stack]:
    """The modules that `factors` has, in float32; always in the same order for the same shapes."""
    alike: dict[tuple[object, ...], list[ModuleRecord]] = defaultdict(list)
    for record in records:
        if record.name in factors:
            of_module = factors[record.name]
            alike[of_module.a.shape, of_module.b.shape, record.scaling].append(record)
    return [
        Stack(
            names := tuple(record.name for record in group),
            group[0].scaling,
            _stacked(factors[name].a for name in names),
            _stacked(factors[name].b for name in names),
        )
        for group in alike.values()
    ]


def _stacked(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().float() for tensor in tensors])
