"""Every format gives the same rows, gzipped too; broken files are named with their row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training_lens.config.data_sections import CsvSection, DataSection
from training_lens.data.examples import SourceFile
from training_lens.data.file_readers import check_csv_settings, detect_format, read_file_rows
from training_lens.data.source_reader import read_examples
from training_lens.errors import DatasetError

ROWS = [{"question": "a, b", "answer": 'say "b"'}, {"question": "c\nd", "answer": "ü"}]


def table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([list(ROWS[0]), *(list(row.values()) for row in ROWS)])
    return text.getvalue().encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


CONTENTS: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "rows.json": lambda: json.dumps(ROWS).encode(),
    "object.json": lambda: json.dumps({"version": 1, "examples": ROWS}).encode(),
    "rows.csv": lambda: table(","),
    "rows.tsv": lambda: table("\t"),
    "rows.parquet": parquet,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, packed: bool) -> None:
    content = CONTENTS[name]()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    rows = list(read_file_rows(SourceFile(path)))
    assert [row.values for row in rows] == ROWS
    first = 2 if "sv" in name else 1  # a table's first row names its columns
    assert [row.number for row in rows] == [first, first + 1]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n\n{"a": 2}\n')
    assert [row.number for row in read_file_rows(SourceFile(file))] == [1, 3]
    table = tmp_path / "a.csv"
    table.write_bytes(b"\xef\xbb\xbfa,b\n1,2\n")
    assert next(read_file_rows(SourceFile(table))).values == {"a": "1", "b": "2"}


def test_formats_are_told_by_name() -> None:
    assert [detect_format(Path(n)) for n in ("a.jsonl.gz", "b.csv", "c.gz", "d.txt")] == [".jsonl", ".csv", None, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: broken JSON"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json, line 2: broken JSON"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 2}]}', r"object with 2 lists of rows \(a, b\)"),
        ("a.json", b'"text"', "single str"),
        ("a.jsonl", b"[1, 2]\n", "row 1: is a int"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: is not UTF-8 text \(byte 0xff at column 8\)"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', "row 1: the key 'a' stands there twice"),
        ("a.json", b'[{"b": 1}, {"b": {"a": 1, "a": 2}}]', "row 2: the key 'a' stands there twice"),
        ("a.jsonl", b"\xff\xfe{\x00", "UTF-16"),
        ("a.jsonl", b"\x00\x01\x02", "is binary"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"end its name in \.gz"),
        ("a.csv", b"PK\x03\x04 ", "zip archive"),
        ("a.csv", b' [{"a": 1}]', r"is JSON; end its name in \.json"),
        ("a.jsonl.gz", b"{}", "broken gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "broken gzip"),
        ("a.txt", b"hello", r"ending '\.txt'"),
        ("a.csv", b"a,b\n1,2\n1\n", "row 3: has 1 cells, the first row names 2"),
        ("a.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("a.csv", b'a,b\n1,"2\n', "row 2: broken table"),
        ("a.csv", "a,b\n1,Привет\n".encode("cp1251"), r"a\.csv, line 2: is not UTF-8 text\. .*data\.csv\.encoding"),
        ("a.parquet", b"hello", "no Parquet"),
        ("a.parquet", b"PAR1 and nothing else PAR1", "broken Parquet"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        list(read_file_rows(SourceFile(file)))


def test_settings_of_tables_that_evaluation_does_not_use_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    data = DataSection(csv=CsvSection(delimiter=";"))
    with caplog.at_level("INFO"):
        assert len(list(read_examples([str(tmp_path / "a.jsonl")], "data.validation", data))) == 1
    assert "data.validation: not used: data.csv.delimiter: applies to tables of text" in caplog.text


def test_settings_of_tables_are_refused_where_no_source_is_one() -> None:
    settings = CsvSection(delimiter=";", quotechar=None)
    check_csv_settings(settings, ["rows.jsonl", "rows.csv.gz"])
    check_csv_settings(CsvSection(), ["rows.jsonl"])
    with pytest.raises(
        DatasetError, match=r"^data\.csv\.delimiter, data\.csv\.quotechar: .* none of rows\.jsonl is one"
    ):
        check_csv_settings(settings, ["rows.jsonl"])
