"""What a file of JSON holds decides how it is read, whatever its name says; what is set aside is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training_lens.data.examples import SourceFile
from training_lens.data.file_readers import read_file_rows
from training_lens.errors import DatasetError

ROWS = [{"question": "a\u2028b", "answer": "c"}, {"question": "d", "answer": "e"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
PRETTY = json.dumps(ROWS, indent=2)


def read(tmp_path: Path, name: str, text: str) -> tuple[list[Any], list[str]]:
    """The rows' values, and what was said of the file."""
    (path := tmp_path / name).write_text(text, encoding="utf-8")
    sentences: list[str] = []
    return [row.values for row in read_file_rows(SourceFile(path, add_remark=sentences.append))], sentences


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "A.JSONL"])
@pytest.mark.parametrize(
    ("text", "is_lines"),
    [
        (LINES, True),
        (LINES + "\n\n", True),
        (LINES.replace("\n", "\r\n"), True),
        (PRETTY, False),
        (json.dumps(ROWS), False),
        (json.dumps(ROWS[0], indent=1) + "\n" + json.dumps(ROWS[1], indent=1), False),
    ],
)
def test_one_content_gives_one_result_under_every_name(tmp_path: Path, name: str, text: str, is_lines: bool) -> None:
    rows, sentences = read(tmp_path, name, text)
    assert rows == ROWS
    assert bool(sentences) == (is_lines == (name == "a.json") or ("}\n{" in text and not is_lines))


@pytest.mark.parametrize(
    ("value", "rows", "sentence"),
    [
        (ROWS[0], [ROWS[0]], "holds one object, which is taken as one row"),
        ({"messages": CHAT}, [{"messages": CHAT}], "one object"),
        ({"conversations": SHAREGPT, "id": 7}, [{"conversations": SHAREGPT, "id": 7}], "one object"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [{"prompt": CHAT[:1], "completion": CHAT[1:]}], "one object"),
        ({"frage": "a", "antwort": 3}, [{"frage": "a", "antwort": 3}], "one object"),
        (ROWS[0] | {"tools": [{"name": "f"}]}, [ROWS[0] | {"tools": [{"name": "f"}]}], "one object"),
        ({"version": "1", "data": ROWS}, ROWS, "its rows are those of 'data'; not used: 'version'"),
        ({"chats": [CHAT, CHAT]}, [{"messages": CHAT}] * 2, "its rows are those of 'chats'"),
        ([CHAT, SHAREGPT], [{"messages": CHAT}, {"messages": SHAREGPT}], None),
        (CHAT, [{"messages": CHAT}], "holds one list of messages"),
    ],
)
def test_a_single_value_is_a_row_or_holds_rows(tmp_path: Path, value: Any, rows: list[Any], sentence: str) -> None:
    found, sentences = read(tmp_path, "a.json", json.dumps(value, indent=2))
    assert found == rows
    assert (sentence in sentences[0]) if sentence else not sentences


def test_lists_of_messages_on_lines_are_rows_and_one_line_is_one_row(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(chat) for chat in (CHAT, SHAREGPT))
    assert read(tmp_path, "a.jsonl", text) == ([{"messages": CHAT}, {"messages": SHAREGPT}], [])
    assert read(tmp_path, "b.jsonl", json.dumps(ROWS[0])) == (ROWS[:1], [])
    assert read(tmp_path, "c.jsonl", json.dumps(CHAT))[0] == [{"messages": CHAT}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"q": 0},\n{"q": 1,}]', r"line 2: .*Fix it there: only in .* each line can data\.on_bad_row=skip"),
        ("a.json", '{"question": {"0": "a"}, "answer": {"0": "b"}}', r"columns .*question, answer.*orient='records'"),
        ("a.json", '{"question": ["a"], "answer": ["b"]}', "columns"),
        ("a.json", "{}", "empty object"),
        ("a.json", '{"question": "a"}\n{"question": \n{"question": "c"}\n', r"a\.json, line 2: broken JSON"),
        ("a.json", '[{"question": "a"}\n {"question": "b"}]', "line 2: broken JSON"),
        ("a.jsonl", '{"question": "a\n{"question": "b"}\n', "line 1: broken JSON"),
        ("a.jsonl", "[[1]]\n[]\n", "row 1: is a list"),
        ("a.jsonl", '{"a": 1},\n{"a": 2},\n', "line 1: broken JSON"),
    ],
)
def test_what_is_no_row_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, name, text)


def test_bad_rows_are_passed_over_where_that_is_wanted(tmp_path: Path) -> None:
    broken = ['{"a": ', "[1]", '{"a": 1, "a": 2}', '{"b": {"c": [{"d": 1, "d": 2}]}}', "\xff"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line.encode("latin-1") for line in ['{"q": 0}', *broken, '{"q": 6}']))
    bad: list[int] = []
    rows = list(read_file_rows(SourceFile(path, on_bad_row=lambda number, error: bad.append(number))))
    assert ([row.number for row in rows], bad) == ([1, 7], [2, 3, 4, 5, 6])
    whole = tmp_path / "b.json"
    whole.write_text('[{"q": 0}, 1, {"a": 1, "a": 2}, {"q": 3}]')
    bad.clear()
    rows = list(read_file_rows(SourceFile(whole, on_bad_row=lambda number, error: bad.append(number))))
    assert ([row.number for row in rows], bad) == ([1, 4], [2, 3])
