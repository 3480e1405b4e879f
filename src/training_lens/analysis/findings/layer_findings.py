"""Exploding and vanishing layers: gradients or steps that grow or fade while those of sibling modules do not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training_lens.analysis.findings.evidence import list_names, thin_points
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analyzers.module_groups import gradient_norms, step_ratio
from training_lens.core import table_names as tables
from training_lens.core.modules import OF_EXPERT
from training_lens.core.recording import Recording
from training_lens.core.types import ModuleRecord, Series
from training_lens.measures.curves import robust_z

FACTOR = 30.0
ROBUST_Z = 6.0
SUSPECT_FACTOR, SUSPECT_Z = 10.0, 3.5  # from here on it is not fine either
OWN_FACTOR = 3.0  # of a module's own change: one that stays constant while its siblings fade does not explode
LEAST_SIBLINGS = 4  # modules of one type that a median over them needs
SEGMENTS = 10  # of the run; the median of each ignores single steps
LEAST_STEPS = 3  # of a segment
LATE = 0.2  # of the run
RULE = Rule(
    code="layers",
    signature="a module's gradient norm or step ratio departs from the median of its module type and from its own past",
    threshold=f"a factor over {FACTOR:g} from both, over {OWN_FACTOR:g} from its own earlier value, and a robust z "
    f"over {ROBUST_Z:g} among the changes of the logarithms in its module type; inconclusive from {SUSPECT_FACTOR:g} "
    f"and {SUSPECT_Z:g} on",
    source="relative to this run: z is the distance from the median in units of 1.4826 MAD, and 3.5 is an outlier "
    "(Iglewicz and Hoaglin 1993); factor and z are wide, so that layers that always differ are not reported",
    action="check the named layer: lower training.lr, check its dtype, or leave it out of peft.target_modules",
)


class _Outlier(NamedTuple):
    """A module that departs from its type: the measure, the first step, and the factors from its type and its past."""

    module: str
    measure: str
    step: int
    from_kind: float
    from_past: float
    z: float

    @property
    def has_grown(self) -> bool:
        return self.from_kind > 1

    @property
    def is_certain(self) -> bool:
        return min(abs(np.log(self.from_kind)), abs(np.log(self.from_past))) > np.log(FACTOR) and abs(self.z) > ROBUST_Z


def check_layers(recording: Recording) -> Finding:
    """Whether a layer explodes or vanishes: its values depart from those of its siblings during the run."""
    measures = {"gradient norm": gradient_norms(recording), "step ratio": step_ratio(recording)}
    seen = {name: series for name, series in measures.items() if len(_split_steps(series)) > 1}
    kinds = {name: _group_siblings(recording.modules, series) for name, series in seen.items()}
    if not any(kinds.values()):
        return RULE.report_inconclusive(
            "Not enough data on exploding or vanishing layers",
            f"{', '.join(f'{len(series.steps)} steps of the {name}' for name, series in measures.items())}; at most "
            f"{max(Counter(module.kind for module in recording.modules).values(), default=0)} modules of one type",
            f"captures of at least {2 * LEAST_STEPS} steps, and {LEAST_SIBLINGS} modules of one type: a model with "
            "fewer layers has too little to compare",
        )
    found = [
        apart for name, series in seen.items() if kinds[name] for apart in _find_outliers(name, series, kinds[name])
    ]
    if not any(apart.is_certain for apart in found) and found:
        return _report_suspects(found)
    found = [apart for apart in found if apart.is_certain]
    if not found and (late := _count_late_steps(recording, seen)) < LEAST_STEPS:
        return RULE.report_inconclusive(
            "Whether a layer explodes or vanishes at the end is not known",
            f"{late} captured steps in the last {LATE:.0%} of the run",
            "lens.scalars_every=1: a layer may depart from the others between captures",
        )
    if not found:
        watched = {module for of_measure in kinds.values() for kind in of_measure for module in kind}
        return RULE.report_fine(
            "No layer explodes or vanishes", f"{' and '.join(seen)} of {len(watched)} modules compared with their type"
        )
    return _report_outliers(found, measures)


def _count_late_steps(recording: Recording, measures: dict[str, Series]) -> int:
    """Captured steps near the end of the run so far: a layer that departs there must not pass unseen."""
    steps = recording.series(tables.LOSS, "loss").steps
    last = max([int(series.steps[-1]) for series in measures.values()] + [int(step) for step in steps[-1:]])
    return max(int((series.steps > (1 - LATE) * last).sum()) for series in measures.values())


def _group_siblings(modules: Sequence[ModuleRecord], series: Series) -> list[list[str]]:
    """Names of modules of one type and shape that ever have a value over 0, if there are enough of them.

    Experts are left out: each has as much of a gradient as its router gives it tokens.
    """
    alike: dict[object, list[str]] = defaultdict(list)
    for module in modules:
        if module.kind.startswith(OF_EXPERT):
            continue
        if module.name in series.names and (np.nan_to_num(series.column(module.name)) > 0).any():
            alike[module.kind, module.in_features, module.out_features].append(module.name)
    return [names for names in alike.values() if len(names) >= LEAST_SIBLINGS]


def _split_steps(series: Series) -> list[np.ndarray]:
    """The indices of the captured steps after 0, split into segments in order."""
    places = np.flatnonzero(series.steps > 0)
    return np.array_split(places, min(SEGMENTS, len(places) // LEAST_STEPS)) if len(places) >= LEAST_STEPS else []


def _find_outliers(measure: str, series: Series, kinds: Sequence[Sequence[str]]) -> list[_Outlier]:
    """The modules that depart from their type, by type, each with the first segment in which it does.

    All types at once, and z only of what has departed far enough: live findings ask this many times in a run.
    """
    segments, columns = _split_steps(series), {name: i for i, name in enumerate(series.names)}
    names = [name for kind in kinds for name in kind]
    kind_of = np.repeat(np.arange(len(kinds)), [len(kind) for kind in kinds])  # (modules,)
    members = [kind_of == kind for kind in range(len(kinds))]
    values = series.values[:, [columns[name] for name in names]]
    values = np.where(np.isfinite(values), values, 0.0)
    smallest = np.where(values > 0, values, np.inf).min(0)  # (modules,)
    least = np.array([smallest[own].min() for own in members])[kind_of] / FACTOR**2  # replaces values that became 0
    # (segments, modules)
    levels = np.log([np.median(np.maximum(values[places], least), axis=0) for places in segments])
    away = levels - np.stack([np.median(levels[:, own], axis=1) for own in members], 1)[:, kind_of]
    found: dict[int, _Outlier] = {}
    for i in range(1, len(segments)):
        moved = away[i] - np.median(away[:i], axis=0)
        change = levels[i] - np.median(levels[:i], axis=0)
        side, factor = np.sign(away[i]), np.minimum(np.abs(away[i]), np.abs(moved))
        far = (factor > np.log(SUSPECT_FACTOR)) & (side == np.sign(moved)) & (change * side > np.log(OWN_FACTOR))
        for j in np.flatnonzero(far).tolist():
            own = members[kind_of[j]]
            z = float(robust_z(change[own])[own[:j].sum()])
            if abs(z) <= SUSPECT_Z:
                continue
            step = int(series.steps[segments[i][0]])
            apart = _Outlier(names[j], measure, step, float(np.exp(away[i, j])), float(np.exp(moved[j])), z)
            if j not in found or (apart.is_certain and not found[j].is_certain):
                found[j] = apart
    return sorted(found.values(), key=lambda apart: kind_of[names.index(apart.module)])


def _report_suspects(found: list[_Outlier]) -> Finding:
    farthest = max(found, key=lambda apart: abs(np.log(apart.from_kind)))
    return RULE.report_inconclusive(
        "A layer departs from the others",
        f"the {farthest.measure} of {farthest.module} is {farthest.from_kind:.3g} times the median of its type from "
        f"step {farthest.step} on (robust z of its change {farthest.z:.1f})",
        "a longer run: of a layer that explodes or vanishes, the factor grows on",
        {"modules": [apart.module for apart in found], "factor": farthest.from_kind},
    )


def _report_outliers(found: list[_Outlier], measures: dict[str, Series]) -> Finding:
    first = min(found, key=lambda apart: (apart.step, -abs(np.log(apart.from_kind))))
    names = list(dict.fromkeys(apart.module for apart in found))
    series = measures[first.measure]
    return RULE.report_symptom(
        "problem" if first.has_grown else "warning",
        f"{'Exploding' if first.has_grown else 'Vanishing'} layer",
        f"the {first.measure} of {first.module} is {first.from_kind:.3g} times the median of its type (robust z of "
        f"its change {first.z:.1f}); that ratio changed by a factor of {first.from_past:.3g}",
        where=f"{list_names(names)}, from step {first.step}",
        evidence={
            "modules": names,
            "step": first.step,
            "factor": first.from_kind,
            "measure": first.measure,
            f"{first.measure} of {first.module}": thin_points(x=series.steps, y=series.column(first.module)),
        },
    )
