"""Measures of modules over the steps: by module, layer or type, relative to the base's, thinned for figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from training_lens.core import table_names as tables
from training_lens.core.arrow import suggest_name
from training_lens.core.recording import Recording
from training_lens.core.types import ModuleRecord, Series
from training_lens.errors import ConfigurationError

By = Literal["module", "layer", "kind"]
MODULE_TABLES = (tables.GRADIENTS, tables.WEIGHTS, tables.SPECTRA, tables.OPTIMIZER, tables.LORA_ACTIVATIONS)
VECTORS = ("singular_values",)
OUTSIDE = "outside"  # the decoder layers: embeddings, the output head


def group_modules(modules: Sequence[ModuleRecord], by: By) -> dict[str, list[str]]:
    """The modules of each layer ("0", "1", ..., "outside"), of each kind, or each alone."""
    if by not in get_args(By):
        raise ConfigurationError(f"by: '{by}' is given; there are: {', '.join(get_args(By))}.")
    found: dict[str, list[str]] = {}
    for module in sorted(modules, key=lambda m: (m.layer is None, m.layer or 0)) if by == "layer" else modules:
        layer = OUTSIDE if module.layer is None else str(module.layer)
        group = {"module": module.name, "layer": layer, "kind": module.kind}[by]
        found.setdefault(group, []).append(module.name)
    return found


def group_series(series: Series, modules: Sequence[ModuleRecord], by: By, *, norms: bool) -> Series:
    """One column for each layer or kind.

    Args:
        norms: the measure is a matrix norm. A group's value is then the norm of all its matrices together: the root of
            the sum of squares, NaN where one is NaN. Otherwise it is the median, NaN left out.
    """
    column = {name: i for i, name in enumerate(series.names)}
    groups = {
        group: [column[name] for name in names if name in column] for group, names in group_modules(modules, by).items()
    }
    groups = {group: columns for group, columns in groups.items() if columns}
    members = [series.values[:, columns] for columns in groups.values()]
    values = [np.sqrt(np.square(each).sum(1)) if norms else nan_median(each) for each in members]
    return Series(series.steps, tuple(groups), np.stack(values, 1) if values else np.zeros((len(series.steps), 0)))


def nan_median(values: np.ndarray) -> np.ndarray:
    """The median of each row, NaN left out; NaN for a row without numbers, and no warning as from numpy."""
    result = np.full(len(values), np.nan)
    whole = ~np.isnan(values).any(1)
    result[whole] = np.median(values[whole], 1) if values.shape[1] else np.nan
    for row in np.flatnonzero(~whole):
        known = values[row][~np.isnan(values[row])]
        result[row] = np.median(known) if len(known) else np.nan
    return result


def relative_to_base(norms: Series, base: Series) -> Series:
    """Norms over the frozen weights' norms: update strength from norm_update, step ratio from norm_step.

    NaN where the base's norm is unknown or 0. Formula: ||dW||_F / ||W||_F, `base` being the table's `norm` of one step.
    """
    known = dict(zip(base.names, base.values[-1], strict=True)) if len(base.steps) else {}
    divisors = np.array([known.get(name) or np.nan for name in norms.names])
    return Series(norms.steps, norms.names, norms.values / divisors)


def update_strength(recording: Recording) -> Series:
    """||dW||_F / ||W||_F of each module over the steps."""
    return relative_to_base(recording.series(tables.WEIGHTS, "norm_update"), recording.series(tables.BASE, "norm"))


def step_ratio(recording: Recording) -> Series:
    """The change of dW in a step (of checkpoints: since the one before) over ||W||_F, of each module."""
    return relative_to_base(recording.series(tables.WEIGHTS, "norm_step"), recording.series(tables.BASE, "norm"))


def gradient_norms(recording: Recording) -> Series:
    """The norm of (dL/dA, dL/dB) of each module over the steps, before clipping."""
    a, b = (recording.series(tables.GRADIENTS, measure) for measure in ("norm_a", "norm_b"))
    if a.names != b.names or not np.array_equal(a.steps, b.steps):
        return b
    return Series(b.steps, b.names, np.hypot(a.values, b.values))


DERIVED = {"strength": update_strength, "step_ratio": step_ratio, "gradient_norm": gradient_norms}


def measure_names() -> tuple[str, ...]:
    """The measures that `read_evolution` accepts: the derived ones, and `table.measure` of each measure of modules."""
    own = (
        f"{table}.{measure}" for table in MODULE_TABLES for measure in tables.MEASURES[table] if measure not in VECTORS
    )
    return (*DERIVED, *own)


def read_evolution(recording: Recording, measure: str, by: By = "module") -> Series:
    """A measure of modules over the steps at which it was captured.

    By layer or kind, norms (including gradient norms) are combined as the root of the sum of squares, which is the norm
    of all matrices together; ratios, ranks and cosines are medians over modules.

    Args:
        measure: strength (||dW|| / ||W||), step_ratio (||change of dW|| / ||W||), gradient_norm, or `table.measure`
            such as `spectra.effective_rank` (see `measure_names`). A bare measure is one of `adapter_weights`.
        by: module, layer or kind.

    Returns:
        A series without steps if it was not captured.

    Raises:
        ConfigurationError: the measure or `by` is unknown.
    """
    table, _, column = measure.rpartition(".")
    table = table or tables.WEIGHTS
    if measure in DERIVED:
        series = DERIVED[measure](recording)
    elif f"{table}.{column}" in measure_names():
        series = recording.series(table, column)
    else:
        hint = suggest_name(measure, measure_names())
        raise ConfigurationError(f"measure: there is no measure of modules '{measure}'.{hint}")
    is_norm = column.startswith("norm") or measure == "gradient_norm"
    return series if by == "module" else group_series(series, recording.modules, by, norms=is_norm)


def energy_shares(norms: Series, modules: Sequence[ModuleRecord], by: By) -> Series:
    """The share of each layer or kind in the whole update, the sum of ||dW||_F^2; they sum to 1 at each step.

    NaN at steps where a norm is missing or not finite, or all are 0.
    """
    groups = group_series(norms, modules, by, norms=True)
    energy = np.square(groups.values)
    total = energy.sum(1, keepdims=True)
    known = np.isfinite(total) & (total > 0)
    shares = np.divide(energy, total, out=np.full_like(energy, np.nan), where=known)
    return Series(groups.steps, groups.names, shares)


def spread_indices(count: int, most: int) -> np.ndarray:
    """At most `most` (at least 2) of the indices below `count`, evenly, with the first and the last."""
    indices: np.ndarray = np.unique(np.linspace(0, max(0, count - 1), min(count, most)).round().astype(int))
    return indices


def finite_points(recording: Recording, table: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a measure of the whole run is finite, and its values, (points,) each; none if not captured."""
    if not recording.has(table, measure):
        return np.zeros(0, np.int64), np.zeros(0)
    return recording.captures.finite_points(table, measure)


def json_number(value: Any) -> float | None:
    """A number for JSON: None for NaN and infinity."""
    plain = float(value)
    return plain if math.isfinite(plain) else None


def json_numbers(values: Any) -> list[float | None]:
    """A list of `json_number`."""
    return [json_number(value) for value in np.asarray(values).ravel()]


def json_value(value: Any) -> Any:
    """Numbers, texts, lists and mappings as JSON values."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, Mapping):
        return {str(key): json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    return json_number(value) if isinstance(value, float) else value


def latest_values(series: Series) -> dict[str, float | None]:
    """Each name's value at the last step; None where it is not finite."""
    return dict(zip(series.names, json_numbers(series.values[-1]), strict=True)) if len(series.steps) else {}


def find_extremes(by_name: Mapping[str, float | None]) -> dict[str, Any]:
    """The median, the least and the most of the values, and the names that have them; all None without numbers."""
    known = {name: value for name, value in by_name.items() if value is not None}
    if not known:
        return dict.fromkeys(("median", "least", "least_at", "most", "most_at"))
    least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    ends = {"least": known[least], "least_at": least, "most": known[most], "most_at": most}
    return {"median": float(np.median(list(known.values()))), **ends}
