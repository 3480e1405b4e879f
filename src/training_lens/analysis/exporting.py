"""Captures as files that other tools read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from training_lens.core.recording import Recording
from training_lens.core.types import DataType
from training_lens.errors import LensError, OutputError
from training_lens.utils.files import whole_file


def export_tables(
    recording: Recording, data_type: DataType, format: str, folder: Path, *, force: bool = False
) -> dict[Path, int]:
    """Write each table of a kind into `folder` as `{table}.{format}`; gives the files and their rows.

    csv, json and parquet have a row for each step and module; a list in csv is joined by spaces. npz has `steps`,
    `modules` and for each measure an array (steps, modules), of spectra (steps, modules, longest).

    Raises:
        LensError: nothing of that kind was captured; says what there is.
        OutputError: a file is there already, and `force` is false.
    """
    captures = recording.captures
    names = [name for name in captures.tables() if recording.manifest.tables.get(name) == data_type]
    if not names:
        there = sorted({str(recording.manifest.tables[name]) for name in captures.tables()})
        raise LensError(
            f"{recording.folder}: no {data_type.value} were captured. There are: {', '.join(there) or 'no captures'}."
        )
    targets = {name: folder / f"{name}.{format}" for name in names}
    standing = [path for path in targets.values() if path.exists()]
    if standing and not force:
        raise OutputError(f"{standing[0]} is there already. Give --force to write over it, or another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in targets.items():
        with whole_file(path) as temporary:
            WRITERS[format](recording, name, temporary)
    return {path: captures.table(name).num_rows for name, path in targets.items()}


def _csv(recording: Recording, name: str, path: Path) -> None:
    table = recording.captures.table(name)
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if row is None else " ".join(map(str, row)) for row in table.column(i).to_pylist()]
            table = table.set_column(i, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.string()))
    pyarrow.csv.write_csv(table, path)


def _parquet(recording: Recording, name: str, path: Path) -> None:
    pyarrow.parquet.write_table(recording.captures.table(name), path)


def _json(recording: Recording, name: str, path: Path) -> None:
    rows = recording.captures.table(name).to_pylist()
    path.write_text(json.dumps([{k: _finite(v) for k, v in row.items()} for row in rows]) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _npz(recording: Recording, name: str, path: Path) -> None:
    captures, arrays = recording.captures, dict[str, Any]()
    for field in captures.table(name).schema:
        if field.name in ("step", "module"):
            continue
        if pa.types.is_list(field.type):
            steps, vectors = captures.vectors(name, field.name)
            names, values = tuple(vectors), np.stack(list(vectors.values()), 1)
        else:
            series = captures.series(name, field.name)
            steps, names, values = series.steps, series.names, series.values
        arrays |= {"steps": steps, "modules": np.array(names), field.name: values}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


WRITERS: dict[str, Callable[[Recording, str, Path], None]] = {
    "csv": _csv,
    "parquet": _parquet,
    "json": _json,
    "npz": _npz,
}
