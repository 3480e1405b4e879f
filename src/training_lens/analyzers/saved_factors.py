"""Saved factors of many modules: out of a recording, and as stacks of one shape, so that a measure is a few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import ModuleRecord
from training_lens.errors import LensError
from training_lens.measures.factors import Factors


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
    """A and B of each module of a snapshot; of PiSSA with the frozen halves, so that dW is always scaling B A
    (of DoRA, with its magnitude: the low-rank part).

    Raises:
        LensError: there is no snapshot of that step, it is damaged, or of another adapter than the recording.
    """
    tensors = recording.captures.snapshot(tables.SNAPSHOTS, step)
    records = [record for record in recording.modules if f"{record.name}.a" in tensors]
    factors = {name: _factors(tensors, name) for name in (record.name for record in records)}
    for record in records:
        _require_shape(record, factors[record.name], f"{recording.folder}: the snapshot of step {step}")
    return factors


def _factors(tensors: Mapping[str, Tensor], name: str) -> Factors:
    return Factors(tensors[f"{name}.a"], tensors[f"{name}.b"], tensors.get(f"{name}.magnitude"))


def _require_shape(record: ModuleRecord, found: Factors, where: str) -> None:
    rank = (2 if record.variant == "pissa" else 1) * record.rank
    expected = (rank, record.in_features), (record.out_features, rank)
    shapes = tuple(found.a.shape), tuple(found.b.shape)
    if shapes != expected:
        raise LensError(
            f"{where} is not of this run: of {record.name} A and B are {shapes[0]} and {shapes[1]}, expected "
            f"{expected[0]} and {expected[1]}. Move its file away."
        )


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
