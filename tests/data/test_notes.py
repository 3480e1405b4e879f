"""What is noted of sources reaches the user once, counted, and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from training_lens.config.data_sections import DataSection
from training_lens.data.notes import (
    MORE_KEYS,
    MORE_KINDS,
    MOST_KEYS,
    MOST_KINDS,
    DataNotes,
    classify_error,
    list_rows,
    strip_location,
)
from training_lens.data.source_reader import read_usable_examples
from training_lens.data.sources import expand_sources
from training_lens.errors import DatasetError


def test_sentences_are_kept_once_in_order_with_how_often_they_were_said() -> None:
    notes = DataNotes()
    for sentence in ("its answers are JSON", "its hash column is short", "its answers are JSON"):
        notes.add_remark("a.jsonl", sentence)
    assert list(notes.remarks["a.jsonl"].items()) == [("its answers are JSON", 2), ("its hash column is short", 1)]


def test_ever_new_keys_and_kinds_do_not_grow_the_report() -> None:
    notes, rows = DataNotes(), 1000
    for row in range(rows):
        notes.ignore_key("a.jsonl", f"key{row}")
        notes.add_bad_row("a.jsonl", row, f"kind {row}", f"message {row}")
    ignored, bad = notes.ignored_keys["a.jsonl"], notes.bad_rows["a.jsonl"]
    assert len(ignored) == MOST_KEYS + 1 and ignored[MORE_KEYS] == rows - MOST_KEYS
    assert len(bad) == MOST_KINDS + 1 and sum(len(kind.rows) for kind in bad.values()) == rows
    assert bad[MORE_KINDS].message == f"message {MOST_KINDS}"


def test_end_marks_are_counted_over_all_sources(write_rows: Callable[..., Path]) -> None:
    notes = DataNotes()
    for name, answers in (("a.jsonl", ["b</s>"]), ("b.jsonl", ["b </s>", "c<eos>", "d"])):
        path = write_rows([{"question": "a", "answer": answer} for answer in answers], name)
        (source,) = expand_sources([str(path)], "data.train")
        assert [e.messages[1].text.strip() for e in read_usable_examples(source, DataSection(), notes)] == [
            answer[0] for answer in answers
        ]
    assert notes.end_marks == {"</s>": 2, "<eos>": 1}


def test_errors_of_one_reason_in_other_rows_and_turns_are_one_kind() -> None:
    errors = {
        row: DatasetError(f"a.jsonl, row {row}, 'messages' message {turn}: is empty") for row, turn in ((1, 2), (30, 4))
    }
    assert {classify_error(error, "a.jsonl", row) for row, error in errors.items()} == {
        "'messages' message #: is empty"
    }
    named = DatasetError("a.jsonl, line 7: broken JSON (x at column 3)", kind="broken JSON")
    assert classify_error(named, "a.jsonl", 7) == "broken JSON"
    assert strip_location(str(named), "a.jsonl", 7) == "broken JSON (x at column 3)"


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([3], "row 3"),
        ([7, 3], "rows 3 and 7"),
        ([12, 7, 3], "rows 3, 7 and 12"),
        (range(1, 101), "rows 1, 2, 3, 4, 5 and 95 more"),
    ],
)
def test_row_numbers_are_listed_in_order_and_the_many_are_counted(numbers: list[int], expected: str) -> None:
    assert list_rows(numbers) == expected
