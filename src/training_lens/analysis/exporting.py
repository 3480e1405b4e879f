"""Exports captures to files for other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from training_lens.analyzers.module_groups import json_value
from training_lens.core.arrow import MODULE, STEP, extract_series, extract_vectors
from training_lens.core.recording import Recording
from training_lens.core.types import DataType
from training_lens.errors import LensError, OutputError
from training_lens.utils.files import atomic_file


def export_tables(
    recording: Recording, data_type: DataType, format: str, folder: Path, *, force: bool = False
) -> dict[Path, int]:
    """Write each table of a data type into `folder` as `{table}.{format}`; returns files and row counts.

    csv, json and parquet have one row per step and module; lists in csv are joined by spaces. npz has `steps`,
    `modules` and for each measure an array (steps, modules), for spectra (steps, modules, longest), NaN where not
    captured. Snapshot tables are skipped: A and B are safetensors already.

    Raises:
        LensError: nothing of that type was captured; lists what was.
        OutputError: a file exists and `force` is false.
    """
    kinds = {name: recording.manifest.tables.get(name) for name in recording.captures.tables()}
    kinds = {name: kind for name, kind in kinds.items() if kind and recording.captures.measures(name)}
    targets = {name: folder / f"{name}.{format}" for name, kind in kinds.items() if kind == data_type}
    if not targets:
        there = ", ".join(sorted({str(kind) for kind in kinds.values()})) or "no captures"
        raise LensError(f"{recording.folder}: no {data_type.value} were captured. There are: {there}.")
    standing = [path for path in targets.values() if path.exists()]
    if standing and not force:
        raise OutputError(f"{standing[0]} exists already. Give --force to overwrite it, or another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, path in targets.items():
        table = recording.captures.table(name)  # read once, as it may be longer at the next read while training runs
        with atomic_file(path) as temporary:
            WRITERS[format](table, temporary)
        counts[path] = table.num_rows
    return counts


def _write_csv(table: pa.Table, path: Path) -> None:
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if row is None else " ".join(map(str, row)) for row in table.column(i).to_pylist()]
            table = table.set_column(i, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.string()))
    pyarrow.csv.write_csv(table, path)


def _write_json(table: pa.Table, path: Path) -> None:
    path.write_text(json.dumps(json_value(table.to_pylist())) + "\n", encoding="utf-8")


def _write_npz(table: pa.Table, path: Path) -> None:
    steps = np.unique(table.column(STEP).to_numpy())
    modules = table.column(MODULE).unique().to_pylist()
    measures = [field for field in table.schema if field.name not in (STEP, MODULE)]
    arrays: dict[str, Any] = {field.name: _fill_grid(table, field, steps, modules) for field in measures}
    with path.open("wb") as file:
        np.savez_compressed(file, **{"steps": steps, "modules": np.array(modules), **arrays})


def _fill_grid(table: pa.Table, field: pa.Field, steps: np.ndarray, modules: list[str]) -> np.ndarray:
    """(steps, modules), for vectors (steps, modules, longest), as float32, the captured precision."""
    if pa.types.is_list(field.type):
        taken, vectors = extract_vectors(table, field.name)
        longest = max((values.shape[1] for values in vectors.values()), default=0)
        grid = np.full((len(steps), len(modules), longest), np.nan, np.float32)
        for name, values in vectors.items():
            grid[np.searchsorted(steps, taken), modules.index(name), : values.shape[1]] = values
        return grid
    series = extract_series(table, field.name)
    grid = np.full((len(steps), len(modules)), np.nan, np.float32)
    columns = np.array([modules.index(name) for name in series.names], np.int64)
    grid[np.ix_(np.searchsorted(steps, series.steps), columns)] = series.values
    return grid


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "csv": _write_csv,
    "parquet": pyarrow.parquet.write_table,
    "json": _write_json,
    "npz": _write_npz,
}
