"""How a measure moved over the run, by module, layer or kind: what heat maps and curves are drawn from."""

from __future__ import annotations

from training_lens.analyzers.gradient_analyzer import gradient_norms
from training_lens.analyzers.module_groups import (
    NORMS,
    OUTSIDE,
    By,
    energy_shares,
    grouped,
    over_base,
    places,
    step_ratio,
    thinned,
    update_strength,
)
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import nearest_name

__all__ = [
    "OUTSIDE",
    "By",
    "energy_shares",
    "evolution",
    "gradient_norms",
    "grouped",
    "layer_matrix",
    "measure_names",
    "over_base",
    "places",
    "step_ratio",
    "thinned",
    "update_strength",
]
DERIVED = {"strength": update_strength, "step_ratio": step_ratio, "gradient_norm": gradient_norms}
OF_MODULES = (tables.GRADIENTS, tables.WEIGHTS, tables.SPECTRA, tables.OPTIMIZER, tables.LORA_ACTIVATIONS)
VECTORS = ("singular_values",)


def measure_names() -> tuple[str, ...]:
    """What `evolution` takes: strength, step_ratio, gradient_norm, and `table.measure` of each measure of modules."""
    own = (f"{table}.{measure}" for table in OF_MODULES for measure in tables.MEASURES[table] if measure not in VECTORS)
    return (*DERIVED, *own)


def evolution(recording: Recording, measure: str, by: By = "module") -> Series:
    """A measure of modules over the steps at which it was taken.

    By layer or kind, norms (gradient norms among them) are the root of the sum of squares, which is the norm of all
    matrices together; ratios, ranks and cosines are medians over modules.

    Args:
        measure: strength (||dW|| / ||W||), step_ratio (||change of dW|| / ||W||), gradient_norm, or a table and its
            measure such as `spectra.effective_rank` (see `measure_names`), or of the table `adapter_weights` the
            measure alone.
        by: module, layer or kind.

    Returns:
        Without steps where it was not captured.

    Raises:
        ConfigurationError: there is no such measure, or `by` is another.
    """
    series, norms = _of_modules(recording, measure)
    return series if by == "module" else grouped(series, recording.modules, by, norms=norms)


def _of_modules(recording: Recording, measure: str) -> tuple[Series, bool]:
    """The series, and whether it is of norms."""
    if measure in DERIVED:
        return DERIVED[measure](recording), measure == "gradient_norm"
    table, _, column = measure.rpartition(".")
    table = table or tables.WEIGHTS
    if table not in OF_MODULES or column not in tables.MEASURES[table] or column in VECTORS:
        close = nearest_name(measure, measure_names())
        hint = f"did you mean '{close}'?" if close else f"there are: {', '.join(measure_names())}."
        raise ConfigurationError(f"measure: no measure of modules is called '{measure}'; {hint}")
    return recording.series(table, column), column in NORMS


def layer_matrix(recording: Recording, measure: str, most_steps: int = 400) -> Series:
    """Layers (columns, "0", "1", ..., "outside") over steps (rows), for a heat map.

    Args:
        measure: as in `evolution`.
        most_steps: at most so many steps, evenly over the run, the first and the last among them.
    """
    return thinned(evolution(recording, measure, "layer"), most_steps)
