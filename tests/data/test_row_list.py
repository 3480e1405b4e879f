"""A file of row ids: what it may hold, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training_lens.data.examples import TokenizedExample
from training_lens.data.row_list import read_row_list
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import DatasetError


def build_dataset(*rows: tuple[str, int]) -> TokenDataset:
    ids, mask = np.array([1, 2, 3], np.int32), np.array([False, True, True])
    return TokenDataset.from_examples([TokenizedExample(file, row, ids, mask, None) for file, row in rows])


def test_ids_remarks_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# remark\n\na b#.jsonl:2\tloss 3.2: <b>wrong</b>\nC:\\x:3\n")
    listed = read_row_list(path)
    assert listed.lines == {("a b#.jsonl", 2): 3, ("C:\\x", 3): 4}
    dataset = build_dataset(("a b#.jsonl", 1), ("a b#.jsonl", 2), ("C:\\x", 3), ("C:\\x", 2))
    assert listed.find_rows(dataset).tolist() == [False, True, True, False]
    listed.require_rows(dataset)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("rows.jsonl:1\nrows.jsonl\n", "line 2: 'rows.jsonl' is no row id"),
        ("rows.jsonl:one\n", "line 1: 'rows.jsonl:one' is no row id"),
        ("# nothing\n", "names no row"),
        ("rows.jsonl:1\nrow.jsonl:2\n", "line 2: row.jsonl:2. Did you mean 'rows.jsonl'"),
        ("rows.jsonl:9\n", "line 1: rows.jsonl:9"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"data\.exclude: ") as caught:
        read_row_list(path).require_rows(build_dataset(("rows.jsonl", 1)))
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    for name, said in (("lost.txt", "is not there"), ("list.txt", "cannot be read as text")):
        with pytest.raises(DatasetError, match=said):
            read_row_list(tmp_path / name)
