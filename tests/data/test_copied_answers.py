"""Sources whose prompts hold their answers are refused with rows; extraction, choices and a few copies are not."""

from __future__ import annotations

from typing import Any

import pytest

from training_lens.data.examples import Example, Message
from training_lens.data.split_report import CopiedAnswers
from training_lens.errors import DatasetError

NAMES = [f"{first} {second}" for first in ("Ann", "Ben", "Cid", "Dora") for second in ("Hall", "Lake", "Moor", "West")]


def examples(prompt: str, answer: str, more: str = "") -> list[Example]:
    def build(number: int, name: str) -> Example:
        texts = (text.format(name=name, number=number * 37) for text in (prompt, more, answer))
        asked, second, said = texts
        return Example((Message("user", asked, second), Message("assistant", said)), None, "rows.jsonl", number)

    return [build(number, name) for number, name in enumerate(NAMES, 1)]


def count(rows: list[Example]) -> CopiedAnswers:
    counted = CopiedAnswers()
    counted.count_examples(rows)
    return counted


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who lives at {number}?", "more": "It is {name}.", "answer": "It is {name}."},
        {"prompt": "Who lives at {number}? Answer: {name}", "answer": "{name}"},
        {
            "prompt": "Q {number}: {name} lives in the old house behind the church",
            "answer": "{name} lives in the old house",
        },
        {"prompt": "{name}", "more": "of number {number}", "answer": "{name}"},
    ],
    ids=["another field", "at the end", "most of it", "a field of its own"],
)
def test_copies_are_refused_with_rows_and_the_way_out(row: dict[str, Any]) -> None:
    with pytest.raises(DatasetError) as caught:
        count(examples(**row)).refuse_copies({"rows.jsonl": "question -> answer"})
    message = str(caught.value)
    assert "16 of 16 rows" in message and "row 1: " in message and "Ann Hall" in message and "row 4" not in message
    assert "question -> answer" in message and "data.answer_in_prompt=allow" in message


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "{name} has lived for long in the old house behind the church. Who lives there?",
            "answer": "{name}",
        },
        {"prompt": "Is {name} at home? Say yes or no", "answer": "no"},
        {"prompt": "Who lives at {number}?", "answer": "It is {name}."},
        {"prompt": "What is {number} + 1{number}", "answer": "{number}"},
    ],
    ids=["extraction", "a choice", "a question", "part of a number"],
)
def test_other_tasks_are_not(row: dict[str, Any]) -> None:
    count(examples(**row)).refuse_copies({"rows.jsonl": ""})


def test_neither_are_few_rows_nor_few_copies() -> None:
    copies = examples("{name}", "{name}")
    count(copies[:7]).refuse_copies({"rows.jsonl": ""})
    count([*copies[:8], *examples("Who lives at {number}?", "It is {name}.")[:8]]).refuse_copies({"rows.jsonl": ""})
