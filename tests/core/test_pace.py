"""How often a collector looks: fixed, or as its share of the time allows, at steps that runs have in common."""

from __future__ import annotations

import pytest

from training_lens.core.collector import Pace, nice


@pytest.mark.parametrize(
    ("least", "wanted"), [(0, 1), (1, 1), (1.5, 2), (2.1, 5), (5, 5), (5.1, 10), (11, 20), (400, 500), (501, 1000)]
)
def test_nice_steps_are_the_smallest_that_suffice(least: float, wanted: int) -> None:
    assert nice(least) == wanted


def test_a_given_interval_stays() -> None:
    pace = Pace(7, 0.01)
    pace.took(100.0, 0.001)
    assert [step for step in range(1, 22) if pace.due(step)] == [1, 7, 14, 21]


def test_a_costly_capture_comes_seldom_enough_for_its_share() -> None:
    pace = Pace(None, 0.01)
    assert all(pace.due(step) for step in range(1, 5))
    pace.took(0.3, 1.0)  # 0.3 s of 100 s is its share
    assert pace.interval == 50 and pace.due(1) and pace.due(100) and not pace.due(99)
    assert 0.3 / (pace.interval * 1.0) <= 0.01


def test_a_first_capture_that_was_dear_does_not_make_the_rest_rare() -> None:
    pace = Pace(None, 0.01)
    pace.took(3.0, 1.0)  # it sets things up
    assert pace.interval == 500
    pace.took(0.02, 1.0)
    assert pace.interval == 2


def test_a_long_run_is_looked_at_two_hundred_times_at_most() -> None:
    pace = Pace(None, 0.5, 100_000)
    assert pace.interval == 500
    assert Pace(None, 0.5, 100).interval == 1


def test_a_step_without_a_time_changes_nothing() -> None:
    pace = Pace(None, 0.01)
    pace.took(1.0, 0.0)
    assert pace.interval == 1


def test_captures_follow_the_steps_when_these_become_quicker() -> None:
    pace = Pace(None, 0.01)
    pace.steps_take(1.0)  # nothing is known of captures yet
    assert pace.interval == 1
    pace.took(0.3, 5.0)  # beside a first, slow step
    assert pace.interval == 10
    pace.steps_take(1.0)
    assert pace.interval == 50


def test_a_hiccup_of_one_capture_makes_no_gap() -> None:
    pace = Pace(None, 0.01)
    for seconds in (0.02, 9.0):
        pace.took(seconds, 1.0)
    assert pace.interval == 2
    pace.took(9.0, 1.0)  # it stays dear
    assert pace.interval == 1000


def test_the_first_steps_and_the_last_are_due_whatever_they_cost() -> None:
    pace = Pace(None, 0.01, 997, always=100)
    pace.took(5.0, 1.0)
    assert pace.interval == 500
    assert [step for step in range(998) if pace.due(step)] == [*range(1, 101), 500, 997]
    assert [step for step in range(998) if Pace(400, 0.01, 997, always=100).due(step)] == [1, 400, 800]


def test_a_run_of_known_length_has_about_as_many_captures_as_promised() -> None:
    for total in (24, 100, 934, 20_000):
        pace = Pace(None, 0.0025, total, least=4, most=8)
        assert sum(map(pace.due, range(1, total + 1))) in range(4, 10)  # multiples of a nice number, and the first step
        pace.took(1e9, 1.0)
        assert sum(map(pace.due, range(1, total + 1))) in range(2, 6)
    assert Pace(None, 0.01, 100_000, most=None).interval == 1
