"""Rows of Arrow are those that JSON Lines would hold: nulls that pad structs are gone, others stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from training_lens.data.sources import expand_sources
from training_lens.utils.arrow_rows import iterate_arrow_rows


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": name, "function": {"name": name, "arguments": arguments}}


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call("f", x=1)]},
        ]
    },
    {"messages": [{"role": "assistant", "content": "", "tool_calls": [call("g", place={"lat": 2}, tags=["p", None])]}]},
    {"messages": [{"role": "tool", "content": "done", "tool_call_id": "f"}]},
]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_rows_come_back_as_they_went_in(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.parquet"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        Dataset.from_list(ROWS).save_to_disk(path := tmp_path / "saved")
    (source,) = expand_sources([str(path)], "data.train")
    assert json.dumps([row.values for row in source.read_rows()], sort_keys=True) == json.dumps(ROWS, sort_keys=True)


def test_nulls_of_columns_lists_and_maps_stay() -> None:
    table = pa.table(
        {
            "column": pa.array([None, {"a": None, "b": 1}], pa.struct([("a", pa.int8()), ("b", pa.int8())])),
            "plain": pa.array([None, "x"]),
            "list": pa.array([[None, {"a": None}], None], pa.list_(pa.struct([("a", pa.int8())]))),
            "map": pa.array(
                [[("k", None), ("l", {"a": None})], None], pa.map_(pa.string(), pa.struct([("a", pa.int8())]))
            ),
        }
    )
    assert list(iterate_arrow_rows(table.to_batches())) == [
        {"column": None, "plain": None, "list": [None, {}], "map": {"k": None, "l": {}}},
        {"column": {"b": 1}, "plain": "x", "list": None, "map": None},
    ]
