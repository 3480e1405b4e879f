"""Rows that a Python program holds in tables are the rows that it would have written to a file."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from training_lens.config.data_sections import DataSection
from training_lens.errors import ConfigurationError

ROWS = [
    {"question": "a", "answer": 3, "meta": {"seen": [1, 2]}},
    {"question": "b", "answer": None, "meta": {"seen": []}},
]
CALLS = [{"messages": [{"role": "user", "content": "x", "calls": [{"name": n, "arguments": {n: 1}}]}]} for n in "ab"]


@pytest.mark.parametrize("table", [Dataset.from_list(ROWS), pa.Table.from_pylist(ROWS)])
def test_tables_of_arrow_are_their_rows(table: Any) -> None:
    assert DataSection(train=table).train == ROWS
    assert DataSection(train=[table, table]).train == ROWS * 2  # type: ignore[list-item]


def test_a_frame_is_its_rows_and_what_is_missing_is_null() -> None:
    frame = pd.DataFrame(
        {
            "question": ["a", np.nan, pd.NA, "d"],
            "answer": [1.0, np.nan, 3.0, 4.5],
            "day": pd.to_datetime(["2024-02-01", None, "2024-02-03", "2024-02-04"]),
            "tags": [np.array([1, 2]), ["x"], {"a": float("nan"), "b": None}, datetime.time(9, 30)],
        }
    )
    rows: Any = DataSection(train=frame[["question", "answer", "day", "tags"]]).train  # type: ignore[arg-type]
    assert [row["question"] for row in rows] == ["a", None, None, "d"]
    assert [row["answer"] for row in rows] == [1.0, None, 3.0, 4.5]
    assert [row["day"] for row in rows] == ["2024-02-01T00:00:00", None, "2024-02-03T00:00:00", "2024-02-04T00:00:00"]
    assert [row["tags"] for row in rows] == [[1, 2], ["x"], {"a": None, "b": None}, "09:30:00"]


def test_an_index_with_a_name_is_a_field_and_one_without_is_none() -> None:
    frame = pd.DataFrame({"question": ["a"], "answer": ["b"]}, index=[7])
    assert DataSection(train=frame).train == [{"question": "a", "answer": "b"}]  # type: ignore[arg-type]
    named = DataSection(train=frame.rename_axis("id")).train  # type: ignore[arg-type]
    assert named == [{"id": 7, "question": "a", "answer": "b"}]


def test_nulls_that_a_data_set_puts_into_structs_are_no_values() -> None:
    assert DataSection(train=Dataset.from_list(CALLS)).train == CALLS  # type: ignore[arg-type]
    frame = pd.DataFrame(CALLS)
    assert DataSection(train=frame).train == CALLS  # type: ignore[arg-type]


def test_one_row_is_a_list_of_one() -> None:
    row: Any = {"question": "a", "answer": "b"}
    assert DataSection(train=row).train == [row]
    chat: Any = {"messages": CALLS[0]["messages"], "tools": [{"name": "f"}]}
    assert DataSection(validation=chat).validation == [chat]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            DatasetDict({"fit": Dataset.from_list(ROWS)}),
            r"data set has splits \(fit\); give one of them, such as \['fit'\]",
        ),
        (Dataset.from_list(ROWS).to_iterable_dataset(), "is a stream"),
        (pd.DataFrame([["a", "b"]], columns=["q", "q"]), "several columns of one name"),
        ({"question": ["a"], "answer": ["b"]}, "these are columns"),
        ([*ROWS, None], rf"^train: item {len(ROWS) + 1} of {len(ROWS) + 1} is None, where others are rows; give"),
        (["rows.jsonl", *ROWS, ...], r"item 1 of \d is 'rows.jsonl' \(and 1 more\), where others are rows"),
    ],
)
def test_what_is_no_list_of_rows_is_refused_with_the_way_out(value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DataSection(train=value)
