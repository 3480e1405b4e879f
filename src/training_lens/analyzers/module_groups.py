"""Measures of modules put together by layer or by kind, over the base's, and thinned for pictures; plain numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import ModuleRecord, Series
from training_lens.errors import ConfigurationError

By = Literal["module", "layer", "kind"]
NORMS = {"norm", "norm_a", "norm_b", "norm_magnitude", "norm_update", "norm_step"}
OUTSIDE = "outside"  # of all decoder layers: embeddings, the output head


def places(modules: Sequence[ModuleRecord], by: By) -> dict[str, list[str]]:
    """The modules of each layer ("0", "1", ..., "outside"), of each kind, or each alone.

    Raises:
        ConfigurationError: `by` is none of these.
    """
    if by not in get_args(By):
        raise ConfigurationError(f"by: '{by}' is given; there are: {', '.join(get_args(By))}.")
    found: dict[str, list[str]] = {}
    for module in sorted(modules, key=lambda m: (m.layer is None, m.layer or 0)) if by == "layer" else modules:
        layer = OUTSIDE if module.layer is None else str(module.layer)
        group = {"module": module.name, "layer": layer, "kind": module.kind}[by]
        found.setdefault(group, []).append(module.name)
    return found


def grouped(series: Series, modules: Sequence[ModuleRecord], by: By, *, norms: bool) -> Series:
    """One column for each layer or kind.

    Args:
        norms: whether the measure is a norm of matrices: then a group's is the root of the sum of their squares, which
            is the norm of all of them together, NaN where one of them is. Else its median, of those that are no NaN.
    """
    column = {name: i for i, name in enumerate(series.names)}
    groups = {group: [column[name] for name in names if name in column] for group, names in places(modules, by).items()}
    groups = {group: columns for group, columns in groups.items() if columns}
    together = _root_of_squares if norms else median
    values = [together(series.values[:, columns]) for columns in groups.values()]
    return Series(series.steps, tuple(groups), np.stack(values, 1) if values else np.zeros((len(series.steps), 0)))


def _root_of_squares(values: np.ndarray) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.square(values).sum(1))
    return root


def median(values: np.ndarray) -> np.ndarray:
    """The median of each row, of what is no NaN; NaN for a row without numbers, without numpy's warning."""
    result = np.full(len(values), np.nan)
    whole = ~np.isnan(values).any(1)
    result[whole] = np.median(values[whole], 1) if values.shape[1] else np.nan
    for row in np.flatnonzero(~whole):
        known = values[row][~np.isnan(values[row])]
        result[row] = np.median(known) if len(known) else np.nan
    return result


def over_base(norms: Series, base: Series) -> Series:
    """Norms over those of the frozen weights: update strength of norm_update, step ratio of norm_step.

    NaN where the base's is unknown. Formula: ||dW||_F / ||W||_F, `base` being the table's `norm` of one step.
    """
    known = dict(zip(base.names, base.values[-1], strict=True)) if len(base.steps) else {}
    divisors = np.array([known.get(name, np.nan) for name in norms.names])
    return Series(norms.steps, norms.names, norms.values / divisors)


def update_strength(recording: Recording) -> Series:
    """||dW||_F / ||W||_F of each module over the steps."""
    return over_base(recording.series(tables.WEIGHTS, "norm_update"), recording.series(tables.BASE, "norm"))


def step_ratio(recording: Recording) -> Series:
    """The change of dW in a step (of checkpoints: since the one before) over ||W||_F, of each module."""
    return over_base(recording.series(tables.WEIGHTS, "norm_step"), recording.series(tables.BASE, "norm"))


def energy_shares(norms: Series, modules: Sequence[ModuleRecord], by: By) -> Series:
    """Which share of the whole update each layer or kind carries: of the sum of ||dW||_F^2; sums to 1 at each step.

    NaN at steps where a norm is missing or not finite, or all are 0.
    """
    groups = grouped(norms, modules, by, norms=True)
    energy = np.square(groups.values)
    total = energy.sum(1, keepdims=True)
    known = np.isfinite(total) & (total > 0)
    shares = np.divide(energy, total, out=np.full_like(energy, np.nan), where=known)
    return Series(groups.steps, groups.names, shares)


def thinned(series: Series, most: int) -> Series:
    """At most `most` steps, evenly over the run, with the first and the last.

    Args:
        most: at least 2.
    """
    if len(series.steps) <= most:
        return series
    kept = np.unique(np.linspace(0, len(series.steps) - 1, most).round().astype(int))
    return Series(series.steps[kept], series.names, series.values[kept])


def number(value: Any) -> float | None:
    """A number as JSON has them: None for NaN and infinity."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def numbers(values: Any) -> list[float | None]:
    """A list of `number`."""
    return [number(value) for value in np.asarray(values).ravel()]


def latest(series: Series) -> dict[str, float | None]:
    """Each name's last value that was taken at all; None where it was never finite at that step."""
    return dict(zip(series.names, numbers(series.values[-1]), strict=True)) if len(series.steps) else {}


def extremes(by_name: Mapping[str, float | None]) -> dict[str, Any]:
    """Median, least and most of some names' values, and who has these; None for all without numbers."""
    known = {name: value for name, value in by_name.items() if value is not None}
    if not known:
        return dict.fromkeys(("median", "least", "least_at", "most", "most_at"))
    least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return {
        "median": float(np.median(list(known.values()))),
        "least": known[least],
        "least_at": least,
        "most": known[most],
        "most_at": most,
    }
