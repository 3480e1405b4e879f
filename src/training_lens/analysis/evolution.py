"""A measure over the steps of a run, by module, layer or module type: the data behind heat maps and curves."""

from __future__ import annotations

from training_lens.analyzers.gradient_analyzer import gradient_norms
from training_lens.analyzers.module_groups import (
    NORMS,
    By,
    group_series,
    step_ratio,
    update_strength,
)
from training_lens.core import table_names as tables
from training_lens.core.arrow import suggest_name
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.errors import ConfigurationError

DERIVED = {"strength": update_strength, "step_ratio": step_ratio, "gradient_norm": gradient_norms}
MODULE_TABLES = (tables.GRADIENTS, tables.WEIGHTS, tables.SPECTRA, tables.OPTIMIZER, tables.LORA_ACTIVATIONS)
VECTORS = ("singular_values",)


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
    series, norms = _read_measure(recording, measure)
    return series if by == "module" else group_series(series, recording.modules, by, norms=norms)


def _read_measure(recording: Recording, measure: str) -> tuple[Series, bool]:
    """The series by module, and whether its values are norms."""
    if measure in DERIVED:
        return DERIVED[measure](recording), measure == "gradient_norm"
    table, _, column = measure.rpartition(".")
    table = table or tables.WEIGHTS
    if table not in MODULE_TABLES or column not in tables.MEASURES[table] or column in VECTORS:
        hint = suggest_name(measure, measure_names())
        raise ConfigurationError(f"measure: there is no measure of modules '{measure}'.{hint}")
    return recording.series(table, column), column in NORMS
