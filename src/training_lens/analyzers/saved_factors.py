"""Saved factors of many modules: read from a recording, and batched by shape, so that a measure takes few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training_lens.core import table_names as tables
from training_lens.core.modules import stack_float32
from training_lens.core.recording import Recording
from training_lens.core.types import ModuleRecord
from training_lens.errors import LensError
from training_lens.measures.factors import Factors


@dataclass(frozen=True)
class FactorBatch:
    """Named modules of one shape: A (modules, rank, in), B (modules, out, rank), float32, and dW = `scaling` B A."""

    names: tuple[str, ...]
    scaling: float
    factors: Factors


def snapshot_factors(recording: Recording, step: int) -> dict[str, Factors]:
    """A and B of each module of a snapshot, with dW = scaling B A: PiSSA's include the frozen halves.

    With DoRA, that is the low-rank part, and its magnitude is given too. A `LensError` if it is another adapter's.
    """
    tensors = recording.captures.snapshot(tables.SNAPSHOTS, step)
    factors: dict[str, Factors] = {}
    for record in recording.modules:
        name = record.name
        if f"{name}.a" in tensors:
            factors[name] = Factors(tensors[f"{name}.a"], tensors[f"{name}.b"], tensors.get(f"{name}.magnitude"))
            _require_shape(record, factors[name], f"{recording.folder}: the snapshot of step {step}")
    return factors


def _require_shape(record: ModuleRecord, found: Factors, where: str) -> None:
    rank = (2 if record.variant == "pissa" else 1) * record.rank
    expected = (rank, record.in_features), (record.out_features, rank)
    shapes = tuple(found.a.shape), tuple(found.b.shape)
    if shapes != expected:
        raise LensError(
            f"{where} is not of this run: A and B of {record.name} are {shapes[0]} and {shapes[1]}, expected "
            f"{expected[0]} and {expected[1]}. Move its file away."
        )


def batch_factors(records: Sequence[ModuleRecord], factors: Mapping[str, Factors]) -> list[FactorBatch]:
    """The modules in `factors`, batched by shape, in float32; the same shapes give the same order."""
    records_by_shape: dict[tuple[object, ...], list[ModuleRecord]] = defaultdict(list)
    for record in records:
        if record.name in factors:
            pair = factors[record.name]
            records_by_shape[pair.a.shape, pair.b.shape, record.scaling].append(record)
    batches = []
    for group in records_by_shape.values():
        names = tuple(record.name for record in group)
        a, b = (stack_float32(getattr(factors[name], part) for name in names) for part in "ab")
        batches.append(FactorBatch(names, group[0].scaling, Factors(a, b)))
    return batches
