"""Rows that Python programs hold in tables: pandas frames, data sets of `datasets`, tables of pyarrow and polars."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

from training_lens.utils.arrow_rows import iterate_arrow_rows

NOTHING = ("NAType", "NaTType")  # pandas' own words for a missing value


def rows_of_table(value: Any) -> list[dict[str, Any]] | None:
    """The rows of a table, of plain JSON values; None where the value is no table that is known.

    A missing value (NaN, NaT, NA) is null. An index of a frame that has a name is a field; one without is set aside.
    No library is imported: who gives a table has it already.

    Raises:
        ValueError: several splits, a stream, or columns of one name.
    """
    names = {kind.__name__ for kind in type(value).__mro__}
    if names & {"DatasetDict", "IterableDatasetDict"}:
        raise ValueError(
            f"the data set has splits ({', '.join(value)}); give one of them, such as ['{next(iter(value))}']"
        )
    if "IterableDataset" in names:
        raise ValueError("the data set is a stream of unknown length; give a list of its rows, or save it to files")
    module = type(value).__module__.split(".")[0]
    read = _READERS.get((module, type(value).__name__))
    return None if read is None else [_convert_row(row) for row in read(value)]


def _frame_rows(frame: Any) -> Iterable[Mapping[Any, Any]]:
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    if not frame.columns.is_unique:
        raise ValueError("the DataFrame has several columns of one name; rename or drop them")
    rows: Iterable[Mapping[Any, Any]] = frame.to_dict("records")
    return rows


def _dataset_rows(dataset: Any) -> Iterable[Mapping[Any, Any]]:
    return iterate_arrow_rows(dataset.with_format("arrow").iter(1000))


_READERS: dict[tuple[str, str], Callable[[Any], Iterable[Mapping[Any, Any]]]] = {
    ("pandas", "DataFrame"): _frame_rows,
    ("datasets", "Dataset"): _dataset_rows,
    ("pyarrow", "Table"): lambda table: iterate_arrow_rows([table]),
    ("polars", "DataFrame"): lambda frame: frame.to_dicts(),
}


def _convert_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _convert_value(value) for key, value in row.items()}


def _convert_value(value: Any) -> Any:
    """The value as JSON has it, where it has one: arrays are lists, dates their ISO text, missing values null."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if type(value).__name__ in NOTHING:
        return None
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return _convert_row(value)
    if isinstance(value, list | tuple):
        return [_convert_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    return _convert_value(value.tolist()) if type(value).__module__ == "numpy" else value
