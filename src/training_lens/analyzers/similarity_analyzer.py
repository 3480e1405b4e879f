"""How similar the adapters of different steps are, and those of two runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_lens.analyzers.module_groups import json_number, spread_indices
from training_lens.analyzers.saved_factors import FactorBatch, batch_factors, snapshot_factors
from training_lens.core import table_names as tables
from training_lens.core.collector import AnalyzerRegistry
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.types import DataType, ModuleRecord
from training_lens.errors import LensError
from training_lens.measures.directions import principal_angles, update_cosine
from training_lens.measures.factors import Factors
from training_lens.measures.singular_values import energy_rank, singular_vectors

MAX_SNAPSHOTS = 12  # compared with the last one, evenly over the run


@dataclass(frozen=True)
class UpdateSimilarity:
    """How similar two updates of one weight are.

    `cosine` is between dW1 and dW2, NaN where one is zero. `columns` and `rows` are the principal angles in radians,
    ascending, between their left and their right singular vectors. They compare the directions that hold 90 % of the
    energy, as many as the update with fewer has; empty where one update is zero or not finite.
    """

    cosine: float
    columns: tuple[float, ...]
    rows: tuple[float, ...]


@dataclass(frozen=True)
class UpdateDirections:
    """The singular vectors of a batch of updates: u (modules, out, k) and v (modules, in, k), float32.

    `count` (modules,) is how many hold 90 % of the energy; 0 for an update that is zero or not finite.
    """

    batch: FactorBatch
    u: Tensor
    v: Tensor
    count: Tensor

    def select_modules(self, names: Sequence[str]) -> UpdateDirections:
        """The directions of some of its modules, in this order."""
        index = [self.batch.names.index(name) for name in names]
        factors = Factors(self.batch.factors.a[index], self.batch.factors.b[index])
        batch = FactorBatch(tuple(names), self.batch.scaling, factors)
        return UpdateDirections(batch, self.u[index], self.v[index], self.count[index])


def decompose_updates(records: Sequence[ModuleRecord], factors: Mapping[str, Factors]) -> list[UpdateDirections]:
    """Decompose the updates of an adapter, shape by shape. Cost: O((in + out) rank^2) for each module."""
    found = []
    for batch in batch_factors(records, factors):
        u, singular, v = singular_vectors(batch.factors.a, batch.factors.b, batch.scaling)
        found.append(UpdateDirections(batch, u.float(), v.float(), energy_rank(singular).nan_to_num(0).long()))
    return found


def compare_updates(
    first: Sequence[UpdateDirections], second: Sequence[UpdateDirections]
) -> dict[str, UpdateSimilarity]:
    """The similarity of two adapters, for each module that both have; ranks may differ, and weights' shapes not."""
    found: dict[str, UpdateSimilarity] = {}
    for one in first:
        for two in second:
            other_names = set(two.batch.names)
            shared = [name for name in one.batch.names if name in other_names]
            if shared:
                here, there = (
                    f"{each.batch.factors.b.shape[1]} x {each.batch.factors.a.shape[2]}" for each in (one, two)
                )
                if here != there:
                    raise LensError(
                        f"the two cannot be compared: {shared[0]} is {here} in one and {there} in the other. Give two "
                        "runs on one base model."
                    )
                found |= _compare_batches(one.select_modules(shared), two.select_modules(shared))
    return found


def _compare_batches(one: UpdateDirections, two: UpdateDirections) -> dict[str, UpdateSimilarity]:
    """Both have the same modules in the same order."""
    first, second = one.batch.factors, two.batch.factors
    cosines = update_cosine(first.a, first.b, one.batch.scaling, second.a, second.b, two.batch.scaling)
    counts = torch.minimum(one.count, two.count)
    found: dict[str, UpdateSimilarity] = {}
    for k in counts.unique().tolist():
        chosen = counts == k
        columns = _measure_angles(one.u[chosen], two.u[chosen], k)
        rows = _measure_angles(one.v[chosen], two.v[chosen], k)
        names = [name for name, taken in zip(one.batch.names, chosen.tolist(), strict=True) if taken]
        found |= {
            name: UpdateSimilarity(cosine, tuple(left), tuple(right))
            for name, cosine, left, right in zip(names, cosines[chosen].tolist(), columns, rows, strict=True)
        }
    return found


def _measure_angles(first: Tensor, second: Tensor, k: int) -> list[list[float]]:
    """Between the first k directions of each module, (modules, size, directions)."""
    angles: list[list[float]] = principal_angles(first[..., :k], second[..., :k]).tolist() if k else [[] for _ in first]
    return angles


@AnalyzerRegistry.register
class SimilarityAnalyzer(DataAnalyzer):
    """How similar the adapter's snapshots are to the last one: when the update found its direction.

    Gives `steps`, at most twelve, evenly over the run; `last`, the step that they are compared with; for each step, as
    medians over modules, `cosine` of the update with the last, and `columns` and `rows`, the mean principal angle in
    radians between their strongest directions (see `UpdateSimilarity`); and `modules`, the cosine of each module's
    first compared snapshot with its last.
    """

    name = "similarity"
    needs = frozenset({DataType.ADAPTER_WEIGHTS})
    gives = ("steps", "last", "cosine", "columns", "rows", "modules")

    def can_read(self, recording: Recording) -> bool:
        """Whether there are at least two snapshots."""
        return len(recording.captures.snapshot_steps(tables.SNAPSHOTS)) > 1

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        *steps, last = recording.captures.snapshot_steps(tables.SNAPSHOTS)
        steps = [steps[i] for i in spread_indices(len(steps), MAX_SNAPSHOTS)]
        target = _decompose_snapshot(recording, last)
        similarities = [compare_updates(_decompose_snapshot(recording, step), target) for step in steps]
        return {
            "steps": steps,
            "last": last,
            "cosine": [_median_over_modules(each, lambda one: [one.cosine]) for each in similarities],
            "columns": [_median_over_modules(each, lambda one: one.columns) for each in similarities],
            "rows": [_median_over_modules(each, lambda one: one.rows) for each in similarities],
            "modules": {name: json_number(one.cosine) for name, one in similarities[0].items()},
        }


def _decompose_snapshot(recording: Recording, step: int) -> list[UpdateDirections]:
    return decompose_updates(recording.modules, snapshot_factors(recording, step))


def _median_over_modules(
    similarities: Mapping[str, UpdateSimilarity], read: Callable[[UpdateSimilarity], Sequence[float]]
) -> float | None:
    """The median over modules of the mean of what `read` gives; modules without finite values do not count."""
    means = [float(np.mean(values)) for one in similarities.values() if (values := read(one))]
    known = [mean for mean in means if np.isfinite(mean)]
    return float(np.median(known)) if known else None
