"""Captures as Arrow tables, with a row for each step and module and a column for each measure; series from tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from training_lens.core.types import Captured, Series
from training_lens.errors import ConfigurationError, LensError
from training_lens.utils.devices import move_to_one_device
from training_lens.utils.formatting import did_you_mean

STEP, MODULE = "step", "module"
# From batches: `pa.array` would first import pandas (0.3 s).
EMPTY = pa.Table.from_batches([], pa.schema({STEP: pa.int32(), MODULE: pa.dictionary(pa.int32(), pa.string())}))


@dataclass(frozen=True)
class CaptureBuffer:
    """A copy of one step's scalars and vectors, so that it keeps none of the model's tensors alive."""

    step: int
    rows: tuple[str, ...]
    measures: tuple[str, ...]
    scalars: Tensor  # (measures, rows) float32, on the device where they were measured
    vectors: Mapping[
        str, tuple[Tensor, tuple[int, ...]]
    ]  # measure -> (values of all rows concatenated, length of each)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.scalars.nbytes + sum(values.nbytes for values, _ in self.vectors.values())


def buffer_capture(step: int, captured: Captured) -> CaptureBuffer:
    """Copy the scalars and vectors of one step as float32, on their device and without waiting for it.

    Raises:
        LensError: a measure has not one value, or one vector, for each row.
    """
    rows = tuple(captured.rows)
    for measure, values in captured.scalars.items():
        if values.shape != (len(rows),):
            raise LensError(
                f"{measure} at step {step} has shape {tuple(values.shape)} for {len(rows)} rows: "
                f"a collector returns a tensor of shape ({len(rows)},), one value for each row."
            )
    with torch.no_grad():
        scalars = [values.to(torch.float32) for values in captured.scalars.values()]
        stacked = torch.stack(move_to_one_device(scalars)) if scalars else torch.empty(0, len(rows))
        vectors = {
            m: _concatenate_vectors(m, step, values, len(rows)) for m, values in captured.vectors.items() if rows
        }
    return CaptureBuffer(step, rows, tuple(captured.scalars), stacked, vectors)


def _concatenate_vectors(
    measure: str, step: int, values: Sequence[Tensor], rows: int
) -> tuple[Tensor, tuple[int, ...]]:
    if len(values) != rows:
        raise LensError(
            f"{measure} at step {step} has {len(values)} vectors for {rows} rows: "
            "a collector returns one vector for each row."
        )
    flat = torch.cat(move_to_one_device(vector.reshape(-1).to(torch.float32) for vector in values))
    return flat, tuple(vector.numel() for vector in values)


def arrow_table(rows_by_step: Sequence[tuple[int, Captured]]) -> pa.Table:
    """Captures of some steps, as the table that a store would return.

    Returns:
        Columns: step (int32, ascending), module (dictionary of strings), each scalar measure (float32) and each vector
        measure (list of float32). A table row for each capture's row, null for a measure that it lacks.

    Raises:
        LensError: values that do not fit their rows, or two measures or rows of one name.
    """
    return build_table([buffer_capture(step, captured) for step, captured in rows_by_step])


def build_table(buffers: Sequence[CaptureBuffer]) -> pa.Table:
    """Buffered steps as one table. Waits for the device once for each set of measures."""
    buffers_by_measures: dict[tuple[tuple[str, ...], ...], list[CaptureBuffer]] = {}
    for buffer in buffers:
        if buffer.rows and (buffer.measures or buffer.vectors):
            buffers_by_measures.setdefault((buffer.measures, tuple(buffer.vectors)), []).append(buffer)
    return concat_tables([_build_uniform_table(group) for group in buffers_by_measures.values()])


def _build_uniform_table(buffers: Sequence[CaptureBuffer]) -> pa.Table:
    """The table of buffers with the same measures; their rows may differ."""
    measures = buffers[0].measures
    _require_distinct((STEP, MODULE, *measures, *buffers[0].vectors), "columns")
    scalars = torch.cat(move_to_one_device(step.scalars for step in buffers), 1)  # (measures, rows of all steps)
    values = scalars.cpu().numpy()  # the sync point
    steps = np.array([step.step for step in buffers], np.int32)
    columns = {
        STEP: pa.array(np.repeat(steps, [len(step.rows) for step in buffers])),
        MODULE: _encode_rows([step.rows for step in buffers]),
        **{measure: pa.array(row) for measure, row in zip(measures, values, strict=True)},
    }
    for measure in buffers[0].vectors:
        vectors = [step.vectors[measure] for step in buffers]
        lengths = np.concatenate([np.array(lengths, np.int32) for _, lengths in vectors])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = torch.cat(move_to_one_device(flat for flat, _ in vectors)).cpu().numpy()
        columns[measure] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    return pa.table(columns)


def _encode_rows(rows_by_step: Sequence[tuple[str, ...]]) -> pa.DictionaryArray:
    """The row names of all steps, each name stored once."""
    places: dict[str, int] = {}
    indices: dict[tuple[str, ...], np.ndarray] = {}  # most tables have the same rows at every step
    for rows in rows_by_step:
        if rows not in indices:
            _require_distinct(rows, "rows")
            indices[rows] = np.array([places.setdefault(name, len(places)) for name in rows], np.int32)
    encoded = np.concatenate([indices[rows] for rows in rows_by_step])
    return pa.DictionaryArray.from_arrays(pa.array(encoded), pa.array(list(places), pa.string()))


def _require_distinct(names: Sequence[str], what: str) -> None:
    duplicates = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else ()
    if duplicates:
        raise LensError(
            f"two {what} of one table are called '{duplicates[0]}': a collector's measures and rows need different "
            f"names, and no measure may be called '{STEP}' or '{MODULE}'."
        )


def concat_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of all rows, ascending by step; a column that a table lacks is null in its rows.

    Raises:
        LensError: a measure is a number in one and a vector in another.
    """
    try:
        table = pa.concat_tables([EMPTY, *tables], promote_options="default").unify_dictionaries()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise LensError(
            f"one table has a measure as numbers and as vectors ({error}): the folder holds captures of different "
            "versions of a collector. Train again in a new folder, or give the new measure another name."
        ) from error
    steps = table.column(STEP).to_numpy()
    return table if (np.diff(steps) >= 0).all() else table.take(np.argsort(steps, kind="stable"))


def extract_series(table: pa.Table, measure: str) -> Series:
    """A scalar measure over time, at the steps and modules that have it, in the table's order.

    Args:
        table: with the columns step, module and `measure`, ascending by step.

    Raises:
        LensError: the table has no such measure, or its values are vectors.
    """
    _require_kind(table, measure, vectors=False)
    taken, steps, names, rows, columns = _locate_values(table, measure)
    values = np.full((len(steps), len(names)), np.nan)
    values[rows, columns] = taken.column(measure).to_numpy()
    return Series(steps, names, values)


def extract_complete_series(table: pa.Table) -> dict[str, Series]:
    """Each scalar measure that no row lacks, by name: as `extract_series` gives it, at the cost of about one."""
    numbers = [field.name for field in table.schema if field.name not in (STEP, MODULE)]
    numbers = [
        m for m in numbers if not pa.types.is_list(table.schema.field(m).type) and not table.column(m).null_count
    ]
    if not numbers:
        return {}
    _, steps, names, rows, columns = _locate_values(table, numbers[0])
    found = {}
    for measure in numbers:
        values = np.full((len(steps), len(names)), np.nan)
        values[rows, columns] = table.column(measure).to_numpy()
        found[measure] = Series(steps, names, values)
    return found


def extract_vectors(table: pa.Table, measure: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A vector measure over time, such as the singular values.

    Returns:
        The steps that have it, (steps,) int64; and by module (steps, its longest) float64, padded with NaN.

    Raises:
        LensError: the table has no such measure, or its values are scalars.
    """
    _require_kind(table, measure, vectors=True)
    taken, steps, names, rows, columns = _locate_values(table, measure)
    column = taken.column(measure)
    lengths = pc.list_value_length(column).to_numpy()
    filled = np.arange(lengths.max(initial=0)) < lengths[:, None]  # (table rows, longest)
    padded = np.full(filled.shape, np.nan)
    padded[filled] = pc.list_flatten(column).to_numpy()
    found = {}
    for i, name in enumerate(names):
        own = columns == i
        found[name] = np.full((len(steps), lengths[own].max(initial=0)), np.nan)
        found[name][rows[own]] = padded[own, : found[name].shape[1]]
    return steps, found


def _locate_values(
    table: pa.Table, measure: str
) -> tuple[pa.Table, np.ndarray, tuple[str, ...], np.ndarray, np.ndarray]:
    """The rows that have the measure; their steps and modules; and each row's indices into both."""
    table = table.select([STEP, MODULE, measure])
    if table.column(measure).null_count:
        table = table.filter(table.column(measure).is_valid())
    table = table.unify_dictionaries().combine_chunks()
    per_row = table.column(STEP).to_numpy().astype(np.int64)
    new = np.diff(per_row, prepend=-1) != 0
    modules = table.column(MODULE).combine_chunks()
    codes = modules.indices.to_numpy()
    used = np.unique(codes)
    names = tuple(modules.dictionary.take(pa.array(used)).to_pylist())
    return table, per_row[new], names, np.cumsum(new) - 1, np.searchsorted(used, codes)


def choose_columns(table: pa.Table, measures: Sequence[str] | None) -> list[str]:
    """Step, module and the measures, in the table's order; all columns if `measures` is None.

    Raises:
        LensError: the table lacks one of them; names the nearest that it has.
    """
    for measure in measures or ():
        if measure not in table.column_names:
            require_measure(table, measure)
    return [c for c in table.column_names if measures is None or c in (STEP, MODULE, *measures)]


def require_measure(table: pa.Table, measure: str) -> None:
    """Check that the table has a measure.

    Raises:
        LensError: it has not; names the nearest that it has.
    """
    measures = [name for name in table.column_names if name not in (STEP, MODULE)]
    if measure not in measures:
        raise LensError(f"no measure is called '{measure}'.{suggest_name(measure, measures)}")


def _require_kind(table: pa.Table, measure: str, *, vectors: bool) -> None:
    require_measure(table, measure)
    if pa.types.is_list(table.schema.field(measure).type) != vectors:
        raise LensError(
            f"{measure} is a {'number' if vectors else 'vector'} for each step and module: "
            f"read it with {'series' if vectors else 'vectors'}."
        )


def polars_frame(table: pa.Table) -> Any:
    """A table as a Polars DataFrame.

    Raises:
        ConfigurationError: Polars is not installed.
    """
    try:
        import polars
    except ImportError as error:
        raise ConfigurationError(
            "Polars frames need the package polars: pip install polars. Arrow and pandas frames need no extra package."
        ) from error
    return polars.from_arrow(table)


def suggest_name(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name: the nearest known name, or all of them."""
    return did_you_mean(name, known, otherwise=f" There are: {', '.join(sorted(known)) or 'none'}.")
