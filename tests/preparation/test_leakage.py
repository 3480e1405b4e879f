"""What two splits share is found, by kind, on both sides; what one split repeats within itself is no leak."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from training_lens.data.examples import Example, Message
from training_lens.preparation.deduplication import DROPPED, NearIndex, RowMatch, find_equal_leaks, find_near_leaks

TRAIN, VALIDATION, TEST = 0, 1, 2


def leaks(whole: list[int], prompt: list[int], split: list[int]) -> list[RowMatch]:
    return find_equal_leaks(np.array(whole, np.uint64), np.array(prompt, np.uint64), np.array(split), TRAIN)


def test_the_training_row_repeats_the_held_out_one() -> None:
    assert leaks([7, 7], [1, 1], [TRAIN, VALIDATION]) == [RowMatch("exact", 0, 1, 1.0)]
    assert leaks([7, 7], [1, 1], [VALIDATION, TRAIN]) == [RowMatch("exact", 1, 0, 1.0)]


def test_the_same_question_with_another_answer_is_a_leak_of_its_own_kind() -> None:
    assert leaks([7, 8], [1, 1], [TRAIN, TEST]) == [RowMatch("prompt", 0, 1, 1.0)]


def test_held_out_splits_are_compared_with_each_other() -> None:
    assert leaks([7, 7, 7], [1, 1, 1], [TEST, VALIDATION, TRAIN]) == [
        RowMatch("exact", 0, 1, 1.0),
        RowMatch("exact", 2, 1, 1.0),
    ]


def test_repeats_within_a_split_and_dropped_rows_are_none() -> None:
    assert leaks([7, 7, 8, 8], [1, 1, 2, 2], [TRAIN, TRAIN, VALIDATION, VALIDATION]) == []
    assert leaks([7, 7], [1, 1], [TRAIN, DROPPED]) == []


def test_near_rows_are_found_across_splits_alone() -> None:
    words = [f"w{i}" for i in range(100)]
    texts = [" ".join(words), " ".join([*words[:-1], "x"]), " ".join([*words[:-1], "y"]), "quite another text"]
    examples = [Example((Message("assistant", text),), None, "f", i, is_text=True) for i, text in enumerate(texts)]

    def rows() -> Iterator[tuple[int, Example, int]]:
        return ((position, example, 0) for position, example in enumerate(examples))

    found = find_near_leaks(rows, np.array([TRAIN, TRAIN, TEST, TEST]), TRAIN, NearIndex(0.8, 128))
    assert [(leak.kind, leak.row, leak.other) for leak in found] == [("near", 0, 2), ("near", 1, 2)]
    assert all(0.9 < leak.similarity < 1 for leak in found)
    assert find_near_leaks(rows, np.array([TRAIN, TRAIN, TRAIN, TEST]), TRAIN, NearIndex(0.8, 128)) == []
