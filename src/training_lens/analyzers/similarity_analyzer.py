"""How alike the adapters of different steps are, and those of two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_lens.analyzers.module_groups import number, numbers
from training_lens.analyzers.saved_factors import Stack, snapshot_factors, stacks
from training_lens.core import table_names as tables
from training_lens.core.analyzer import DataAnalyzer
from training_lens.core.recording import Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.types import DataType, ModuleRecord
from training_lens.errors import LensError
from training_lens.measures.factors import Factors
from training_lens.measures.singular_values import energy_rank, singular_vectors
from training_lens.measures.subspaces import principal_angles, update_cosine

MOST_SNAPSHOTS = 12  # that are compared with the last one, evenly over the run


@dataclass(frozen=True)
class Likeness:
    """How alike two updates of one weight are.

    `cosine` is that of dW1 and dW2, NaN where one is zero. `columns` and `rows` are the principal angles in radians,
    ascending, between what the two write and what they read: of the strongest directions that hold 90 % of the energy
    of each, as many as the one with fewer needs; none where one is zero or not finite.
    """

    cosine: float
    columns: tuple[float, ...]
    rows: tuple[float, ...]

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"cosine": number(self.cosine), "columns": numbers(self.columns), "rows": numbers(self.rows)}


@dataclass(frozen=True)
class Directions:
    """The singular vectors of the updates of a stack of modules: u (modules, out, k) and v (modules, in, k), float32.

    `count` (modules,) is how many of them hold 90 % of the energy; 0 for an update that is zero or not finite.
    """

    stack: Stack
    u: Tensor
    v: Tensor
    count: Tensor

    def of(self, names: Sequence[str]) -> Directions:
        """Those of some of its modules, in this order."""
        at = [self.stack.names.index(name) for name in names]
        stack = Stack(tuple(names), self.stack.scaling, self.stack.a[at], self.stack.b[at])
        return Directions(stack, self.u[at], self.v[at], self.count[at])


def directions(records: Sequence[ModuleRecord], factors: Mapping[str, Factors]) -> list[Directions]:
    """Decompose the updates of an adapter, shape by shape. Cost: O((in + out) rank^2) for each module."""
    return [_decomposed(stack) for stack in stacks(records, factors)]


def _decomposed(stack: Stack) -> Directions:
    u, singular, v = singular_vectors(stack.a, stack.b, stack.scaling)
    return Directions(stack, u.float(), v.float(), energy_rank(singular).nan_to_num(0).long())


def likenesses(first: Sequence[Directions], second: Sequence[Directions]) -> dict[str, Likeness]:
    """The likeness of two adapters, for each module that both have; ranks may differ.

    Raises:
        LensError: a module's weights are of different shapes; names it and both.
    """
    found: dict[str, Likeness] = {}
    for one in first:
        for two in second:
            theirs = set(two.stack.names)
            shared = [name for name in one.stack.names if name in theirs]
            if shared:
                _require_one_shape(shared[0], one.stack, two.stack)
                found |= _of_pair(one.of(shared), two.of(shared))
    return found


def _require_one_shape(name: str, first: Stack, second: Stack) -> None:
    sizes = [f"{stack.b.shape[1]} x {stack.a.shape[2]}" for stack in (first, second)]
    if sizes[0] != sizes[1]:
        raise LensError(
            f"the two cannot be compared: {name} is {sizes[0]} in one and {sizes[1]} in the other. Give two runs on "
            "one base model."
        )


def _of_pair(one: Directions, two: Directions) -> dict[str, Likeness]:
    """Of the same modules in the same order."""
    (a, b), (a2, b2) = (one.stack.a, one.stack.b), (two.stack.a, two.stack.b)
    cosines = update_cosine(a, b, one.stack.scaling, a2, b2, two.stack.scaling)
    counts = torch.minimum(one.count, two.count)
    found: dict[str, Likeness] = {}
    for k in counts.unique().tolist():
        chosen = counts == k
        columns = _angles(one.u[chosen], two.u[chosen], k)
        rows = _angles(one.v[chosen], two.v[chosen], k)
        names = [name for name, taken in zip(one.stack.names, chosen.tolist(), strict=True) if taken]
        found |= {
            name: Likeness(cosine, tuple(of_columns), tuple(of_rows))
            for name, cosine, of_columns, of_rows in zip(names, cosines[chosen].tolist(), columns, rows, strict=True)
        }
    return found


def _angles(first: Tensor, second: Tensor, k: int) -> list[list[float]]:
    """Between the first k directions of each module, (modules, size, directions)."""
    if k == 0:
        return [[] for _ in first]
    angles: list[list[float]] = principal_angles(first[..., :k], second[..., :k]).tolist()
    return angles


@AnalyzerRegistry.register
class SimilarityAnalyzer(DataAnalyzer):
    """How alike the adapter's snapshots are to the last one: when its update found its direction.

    Gives `steps` (at most twelve, evenly over the run, and the last itself left out) and `last`, the step that they are
    compared with; for each step, as medians over modules: `cosine` of the update with the last, and `columns` and
    `rows`, the mean principal angle in radians between their strongest directions (`Likeness`); and `modules`, the
    cosine of each module's first compared snapshot with its last.
    """

    name = "similarity"
    needs = frozenset({DataType.ADAPTER_WEIGHTS})
    gives = ("steps", "last", "cosine", "columns", "rows", "modules")

    def can_read(self, recording: Recording) -> bool:
        """Whether there are two snapshots."""
        return len(recording.captures.snapshot_steps(tables.SNAPSHOTS)) > 1

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        *steps, last = recording.captures.snapshot_steps(tables.SNAPSHOTS)
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_SNAPSHOTS)).round().astype(int))
        steps = [steps[i] for i in kept]
        target = _snapshot(recording, last)
        alike = [likenesses(_snapshot(recording, step), target) for step in steps]
        return {
            "steps": steps,
            "last": last,
            "cosine": [_median([one.cosine for one in each.values()]) for each in alike],
            "columns": [_median([_mean(one.columns) for one in each.values()]) for each in alike],
            "rows": [_median([_mean(one.rows) for one in each.values()]) for each in alike],
            "modules": {name: number(one.cosine) for name, one in alike[0].items()},
        }


def _snapshot(recording: Recording, step: int) -> list[Directions]:
    return directions(recording.modules, snapshot_factors(recording, step))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else np.nan


def _median(values: Sequence[float]) -> float | None:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else None
