"""JSON and JSONL by path, glob and embedded name; broken files are named with their line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training_lens import embedded
from training_lens.data.sources import expand, read_rows
from training_lens.errors import DatasetError

ROWS = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]


def test_lists_objects_and_lines_read_alike(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    files = [write_rows(ROWS, "a.jsonl"), write_rows(ROWS, "b.json"), tmp_path / "c.json"]
    files[2].write_text(json.dumps({"version": 1, "data": ROWS}))
    for file in files:
        rows = list(read_rows(file))
        assert [row.values for row in rows] == ROWS
        assert [row.number for row in rows] == [1, 2]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n\n{"a": 2}\n')
    assert [row.number for row in read_rows(file)] == [1, 3]


def test_globs_and_paths_merge_in_order_each_once(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    a, b = write_rows(ROWS, "a.jsonl"), write_rows(ROWS, "b.jsonl")
    assert expand([str(b), str(tmp_path / "*.jsonl")], "data.train") == [b, a]
    assert expand([embedded.TRAIN], "data.train") == [embedded.PATHS[embedded.TRAIN]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: broken JSON"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json, line 2: broken JSON"),
        ("a.json", b'{"a": [1], "b": [2]}', r"object with 2 lists \(a, b\)"),
        ("a.json", b'"text"', "single str"),
        ("a.jsonl", b"[1, 2]\n", "row 1: is a list"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.txt", b"hello", r"ending '\.txt'"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        list(read_rows(file))


def test_missing_files_suggest_the_nearest(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    write_rows(ROWS, "train.jsonl")
    with pytest.raises(DatasetError, match=r"data\.train: .*trian\.jsonl' is not there.*Did you mean .*train\.jsonl"):
        expand([str(tmp_path / "trian.jsonl")], "data.train")
    with pytest.raises(DatasetError, match="matches no file"):
        expand([str(tmp_path / "*.csv")], "data.train")
    with pytest.raises(DatasetError, match=r"is a folder, expected files.*1 files"):
        expand([str(tmp_path)], "data.train")
    with pytest.raises(DatasetError, match=r"there are embedded:train and embedded:heldout"):
        expand(["embedded:trian"], "data.train")
    with pytest.raises(DatasetError, match="an empty path"):
        expand([""], "data.train")
    with pytest.raises(DatasetError, match="no folder"):
        expand([str(tmp_path / "no" / "rows.jsonl")], "data.train")
