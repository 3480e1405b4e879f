"""Answers that loop or do not end are told from long and repetitive right ones."""

from __future__ import annotations

import doctest

import pytest

from training_lens.evaluation import answer_endings
from training_lens.evaluation.answer_endings import has_loop, summarize_endings


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 12, True),
        ([7] * 11, False),
        ([1, 2, 3, 4, 5] * 4, True),
        ([1, 2, 3, 4, 5] * 3, False),
        ([9, 8, *[1, 2, 3] * 4, 5, 6], True),  # in the middle, and ended well
        (list(range(200)), False),
        ([*range(64)] * 4, True),
        ([*range(65)] * 4, False),  # longer than any cycle that is looked for
        ([], False),
        ([1], False),
    ],
)
def test_a_loop_is_a_cycle_that_comes_four_times(tokens: list[int], loops: bool) -> None:
    assert has_loop(tokens) is loops


def test_a_right_answer_that_repeats_itself_is_no_loop() -> None:
    song = [4, 5] * 8
    assert summarize_endings([song, song], [False, False], [song, [1]], room=40).looping == 1


@pytest.mark.parametrize(
    ("room", "right", "unended", "cut_short"),
    [(40, 20, 1, 0), (36, 20, 1, 0), (30, 20, 0, 1), (8, 4, 1, 0), (8, 5, 0, 1)],
)
def test_a_cut_tells_only_where_the_right_answer_has_room_to_spare(
    room: int, right: int, unended: int, cut_short: int
) -> None:
    found = summarize_endings([list(range(room))], [True], [[1] * right], room)
    assert (found.unended, found.cut_short) == (unended, cut_short)


def test_no_answers_have_no_endings() -> None:
    assert summarize_endings([], [], [], 8) == answer_endings.Endings(0, 0, 0, 0, 8, 0)


def test_the_examples_of_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(answer_endings)
    assert tried == 1 and not failed
