"""Tables are read however a spreadsheet or a library writes them; what was found is said, what is unclear refused."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from training_lens.config.data_sections import CsvSection
from training_lens.data.examples import SourceFile
from training_lens.data.file_readers import read_file_rows
from training_lens.errors import ConfigurationError, DatasetError

ROWS = [
    {"question": 'Wie heißt „Tier 0", bitte?', "answer": "Müller; 5 €\nund mehr, ja"},
    {"question": "a|b", "answer": "\tc"},
    {"question": "\u0152uvre \u2013 d\u2019\u00e9t\u00e9", "answer": "5"},
]


def read(path: Path, content: bytes, **settings: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows' values, and what was said of the table."""
    path.write_bytes(content)
    sentences: list[str] = []
    source = SourceFile(path, CsvSection(**settings), add_remark=sentences.append)
    return [dict(row.values) for row in read_file_rows(source)], sentences


def table(delimiter: str, encoding: str, line_end: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end)
    writer.writerows([list(ROWS[0]), *(list(row.values()) for row in ROWS)])
    return text.getvalue().encode(encoding)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_every_delimiter_and_encoding_gives_the_same_rows(
    tmp_path: Path, name: str, encoding: str, delimiter: str
) -> None:
    content = table(delimiter, encoding, "\n" if name == "a.csv" else "\r\n")
    rows, sentences = read(tmp_path / name, content)
    assert rows == ROWS
    said = " ".join(sentences)
    assert ("its delimiter is" in said) == (delimiter != {"a.csv": ",", "a.tsv": "\t"}[name])
    assert ("cp1252" in said, "its text is UTF-" in said) == (
        encoding == "cp1252",
        encoding[:6] in ("utf-16", "utf-32"),
    )
    if encoding == "cp1252":
        assert "heißt" in said and "data.csv.encoding" in said


@pytest.mark.parametrize("encoding", ["cp1251", "cp1250", "mac_roman", "cp850", "shift_jis", "gb18030", "cp1253"])
def test_other_encodings_are_refused_with_the_way_out_and_read_when_set(tmp_path: Path, encoding: str) -> None:
    texts = {
        "cp1251": "Привет, как дела?",
        "cp1250": "Zażółć gęślą jaźń, proszę",
        "mac_roman": "Wie heißt die schöne Möwe, été",
        "cp850": "Wie schön für die Möwe, äußerst",
        "shift_jis": "こんにちは、元気ですか",
        "gb18030": "你好,世界怎么样",
        "cp1253": "Καλημέρα, τι κάνεις",
    }
    content = f'question,answer\nq,"{texts[encoding]}"\n'.encode(encoding)
    with pytest.raises(DatasetError, match=r"line 2: is not UTF-8 text\..*data\.csv\.encoding="):
        read(tmp_path / "a.csv", content)
    rows, _ = read(tmp_path / "a.csv", content, encoding=encoding)
    assert rows == [{"question": "q", "answer": texts[encoding]}]


def test_mixed_and_wrong_encodings_name_their_lines(tmp_path: Path) -> None:
    mixed = "question,answer\nq,für\n".encode() + "q,für\n".encode("cp1252")
    with pytest.raises(DatasetError, match="mixes encodings: line 2 is UTF-8, line 3 is not"):
        read(tmp_path / "a.csv", mixed)
    with pytest.raises(DatasetError, match="line 3: is not utf-8-sig text"):
        read(tmp_path / "a.csv", mixed, encoding="utf8")
    late = b"question,answer\n" + b"q,plain\n" * 200_000 + "q,für\n".encode("cp1252")
    rows, sentences = read(tmp_path / "a.csv", late)
    assert rows[-1]["answer"] == "für" and "line 200002" in sentences[0]


@pytest.mark.parametrize(
    ("text", "rows", "sentence"),
    [
        (
            "sep=;\r\nquestion;answer\r\nq, r;1\r\n",
            [{"question": "q, r", "answer": "1"}],
            "first line sets the delimiter",
        ),
        ('"sep=\t"\nquestion\tanswer\nq\t1\n', [{"question": "q", "answer": "1"}], "(tab)"),
        ("question;answer;note, if any\nq;1;x\n", [{"question": "q", "answer": "1", "note, if any": "x"}], "semicolon"),
        ('question, answer\nq, "a, b"\n', [{"question": "q", "answer": "a, b"}], "a space follows"),
        (
            ",question,answer\n0,q,a\n1,r,b\n",
            [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}],
            "index",
        ),
        (
            "question,answer,,\nq,a,,\n,,,\n",
            [{"question": "q", "answer": "a"}],
            "nothing but empty cells are set aside: 1",
        ),
        ("\n;\nquestion;answer\nq;a;\n", [{"question": "q", "answer": "a"}], "behind the last named column"),
        ('text\n"a;b"\n\nc\n', [{"text": "a;b"}, {"text": "c"}], None),
        (
            'question,answer\r"q\nr",a\rs,b',
            [{"question": "q\nr", "answer": "a"}, {"question": "s", "answer": "b"}],
            None,
        ),
    ],
)
def test_what_spreadsheets_and_libraries_write_is_read(
    tmp_path: Path, text: str, rows: list[Any], sentence: str | None
) -> None:
    found, sentences = read(tmp_path / "a.csv", text.encode())
    assert found == rows
    assert sentence in " ".join(sentences) if sentence else not sentences


def test_an_index_that_pandas_wrote_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pd.DataFrame(ROWS).to_csv(path)
    rows, sentences = read(path, path.read_bytes())
    assert rows == ROWS and "its first column has no name" in sentences[0]


def test_a_delimiter_that_cannot_be_told_is_refused_and_can_be_set(tmp_path: Path) -> None:
    content = b"one;two,three\n1;2,3\n4;5,6\n"
    with pytest.raises(
        DatasetError, match=r"delimiter could be ',' \(comma\) .* or ';' \(semicolon\).*data\.csv\.delimiter=comma"
    ):
        read(tmp_path / "a.csv", content)
    rows, sentences = read(tmp_path / "a.csv", content, delimiter="semicolon")
    assert rows[0] == {"one": "1", "two,three": "2,3"} and not sentences
    rows, _ = read(tmp_path / "a.csv", b"question;answer, short\n1;2, 3\n")  # the names of fields decide
    assert rows == [{"question": "1", "answer, short": "2, 3"}]
    rows, _ = read(tmp_path / "a.csv", b"a^b\n1^2\n", delimiter="^")
    assert rows == [{"a": "1", "b": "2"}]


def test_other_ways_of_quoting_can_be_set(tmp_path: Path) -> None:
    escaped = b'question,answer\nq,"say \\"a, b\\""\n'
    with pytest.raises(DatasetError, match=r"row 2: broken table.*data\.csv\.escapechar=backslash"):
        read(tmp_path / "a.csv", escaped)
    assert read(tmp_path / "a.csv", escaped, escapechar="backslash")[0][0]["answer"] == 'say "a, b"'
    plain = b'question\tanswer\n"q\ta\nr\t"b" c\n'
    with pytest.raises(DatasetError, match=r"data\.csv\.quotechar=null"):
        read(tmp_path / "a.tsv", plain)
    rows, _ = read(tmp_path / "a.tsv", plain, quotechar=None)
    assert [row["question"] + row["answer"] for row in rows] == ['"qa', 'r"b" c']


def test_bad_rows_are_passed_over_but_never_those_that_a_quote_swallows(tmp_path: Path) -> None:
    (path := tmp_path / "a.csv").write_text('question,answer\nq,a\nr\ns,b,c\nt,"d" e\nu,f\n,\nv,g,h\n')
    bad: list[tuple[int, str]] = []
    source = SourceFile(path, on_bad_row=lambda number, error: bad.append((number, str(error.kind))))
    assert [row.number for row in read_file_rows(source)] == [2, 6]
    cells = "another number of cells"
    assert bad == [(3, cells), (4, cells), (5, "broken table"), (8, cells)]
    path.write_text('question,answer\nq,a\nr,"b\ns,c\nt,d\n')
    with pytest.raises(DatasetError, match=r"row 3: broken table .* within 3 lines"):
        list(read_file_rows(source))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delimiter": "semi"}, "is not one character; give one, or comma, semicolon"),
        ({"encoding": "utf9"}, "no text encoding that Python knows"),
        ({"encoding": "base64"}, "no text encoding"),
        ({"delimiter": '"'}, "must be different characters"),
    ],
)
def test_settings_that_no_table_can_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CsvSection(**settings)


def test_wide_headers_cost_no_more_than_their_width(tmp_path: Path) -> None:
    columns = 50_000
    content = ",".join(f"c{i}" for i in range(columns)) + "\n" + ",".join(["1"] * columns) + "\n"
    rows, _ = read(tmp_path / "a.csv", content.encode())
    assert len(rows[0]) == columns
