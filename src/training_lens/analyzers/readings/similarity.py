"""How alike the adapters of different steps are, and those of two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_lens.analyzers.grouping import number, numbers
from training_lens.analyzers.similarity import update_angles, update_cosine
from training_lens.analyzers.snapshots import Stack, snapshot_factors, stacks
from training_lens.analyzers.spectra import energy_rank, singular_values
from training_lens.core import tables
from training_lens.core.analyzer import DataAnalyzer
from training_lens.core.recording import Recording
from training_lens.core.registry import AnalyzerRegistry
from training_lens.core.stacks import Factors
from training_lens.core.types import DataType, ModuleRecord
from training_lens.errors import LensError

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

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"cosine": number(self.cosine), "columns": numbers(self.columns), "rows": numbers(self.rows)}


def likenesses(
    records: Sequence[ModuleRecord],
    first: Mapping[str, Factors],
    second: Mapping[str, Factors],
    second_records: Sequence[ModuleRecord] | None = None,
) -> dict[str, Likeness]:
    """The likeness of two sets of factors, for each module that both have; ranks may differ.

    Args:
        second_records: of the second set, where they are others (another scaling or rank); None: the same.

    Raises:
        LensError: a module's weights are of different shapes; names it and both.
    """
    other = {record.name: record for record in second_records or records}
    both = [record for record in records if record.name in first and record.name in second and record.name in other]
    for record in both:
        _require_one_shape(record, other[record.name])
    found: dict[str, Likeness] = {}
    for one, two in _pairs(both, other, first, second):
        found |= _of_stacks(one, two)
    return {record.name: found[record.name] for record in both}


def _require_one_shape(first: ModuleRecord, second: ModuleRecord) -> None:
    shapes = [(r.out_features, r.in_features) for r in (first, second)]
    if shapes[0] != shapes[1]:
        raise LensError(
            f"the two cannot be compared: {first.name} is {_size(shapes[0])} in one and {_size(shapes[1])} in the "
            "other. Give two runs on one base model."
        )


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _pairs(
    records: Sequence[ModuleRecord],
    others: Mapping[str, ModuleRecord],
    first: Mapping[str, Factors],
    second: Mapping[str, Factors],
) -> list[tuple[Stack, Stack]]:
    """Stacks of the same modules in both: those of one shape here may be of several there."""
    pairs = []
    for there in stacks([others[record.name] for record in records], second):
        names = set(there.names)
        for here in stacks([record for record in records if record.name in names], first):
            chosen = [there.names.index(name) for name in here.names]
            pairs.append((here, Stack(here.names, there.scaling, there.a[chosen], there.b[chosen])))
    return pairs


def _of_stacks(one: Stack, two: Stack) -> dict[str, Likeness]:
    cosines = update_cosine(one.a, one.b, one.scaling, two.a, two.b, two.scaling)
    directions = torch.minimum(_directions(one), _directions(two))  # (modules,)
    found: dict[str, Likeness] = {}
    for k in directions.unique().tolist():
        chosen = (directions == k).nonzero()[:, 0]
        columns, rows = _angles(one, two, chosen, k)
        for place, i in enumerate(chosen.tolist()):
            of_module = (tuple(side[place].tolist()) for side in (columns, rows))
            found[one.names[i]] = Likeness(float(cosines[i]), *of_module)
    return found


def _directions(stack: Stack) -> Tensor:
    """How many directions hold 90 % of each update's energy, (modules,) int64; 0 for what is zero or not finite."""
    return energy_rank(singular_values(stack.a, stack.b, stack.scaling)).nan_to_num(0).long()


def _angles(one: Stack, two: Stack, chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of columns and of rows, each (chosen, k)."""
    if k == 0:
        return torch.zeros(len(chosen), 0), torch.zeros(len(chosen), 0)
    angles = update_angles(one.a[chosen], one.b[chosen], two.a[chosen], two.b[chosen], k)
    return angles.columns, angles.rows


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
        target = snapshot_factors(recording, last)
        alike = [likenesses(recording.modules, snapshot_factors(recording, step), target) for step in steps]
        return {
            "steps": steps,
            "last": last,
            "cosine": [_median([one.cosine for one in each.values()]) for each in alike],
            "columns": [_median([_mean(one.columns) for one in each.values()]) for each in alike],
            "rows": [_median([_mean(one.rows) for one in each.values()]) for each in alike],
            "modules": {name: number(one.cosine) for name, one in alike[0].items()},
        }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else np.nan


def _median(values: Sequence[float]) -> float | None:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else None
