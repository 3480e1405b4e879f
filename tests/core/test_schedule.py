"""Captures come at a fixed interval, or as often as their share of the time allows, at steps that runs share."""

from __future__ import annotations

import pytest

from training_lens.core.overhead_budget import CaptureSchedule, round_interval


@pytest.mark.parametrize(
    ("least", "wanted"), [(0, 1), (1, 1), (1.5, 2), (2.1, 5), (5, 5), (5.1, 10), (11, 20), (400, 500), (501, 1000)]
)
def test_intervals_are_the_smallest_that_suffice(least: float, wanted: int) -> None:
    assert round_interval(least) == wanted


def test_a_given_interval_stays() -> None:
    schedule = CaptureSchedule(7, 0.01)
    schedule.record_capture(100.0, 0.001)
    assert [step for step in range(1, 22) if schedule.is_due(step)] == [1, 7, 14, 21]


def test_a_costly_capture_comes_seldom_enough_for_its_share() -> None:
    schedule = CaptureSchedule(None, 0.01)
    assert all(schedule.is_due(step) for step in range(1, 5))
    schedule.record_capture(0.3, 1.0)  # 0.3 s of 100 s is its share
    assert schedule.interval == 50 and schedule.is_due(1) and schedule.is_due(100) and not schedule.is_due(99)
    assert 0.3 / (schedule.interval * 1.0) <= 0.01


def test_an_expensive_first_capture_does_not_make_the_rest_rare() -> None:
    schedule = CaptureSchedule(None, 0.01)
    schedule.record_capture(3.0, 1.0)  # it sets things up
    assert schedule.interval == 500
    schedule.record_capture(0.02, 1.0)
    assert schedule.interval == 2


def test_a_long_run_has_at_most_two_hundred_captures() -> None:
    schedule = CaptureSchedule(None, 0.5, 100_000)
    assert schedule.interval == 500
    assert CaptureSchedule(None, 0.5, 100).interval == 1


def test_a_step_without_a_time_changes_nothing() -> None:
    schedule = CaptureSchedule(None, 0.01)
    schedule.record_capture(1.0, 0.0)
    assert schedule.interval == 1


def test_the_interval_follows_the_step_time() -> None:
    schedule = CaptureSchedule(None, 0.01)
    schedule.record_step_time(1.0)  # nothing is known of captures yet
    assert schedule.interval == 1
    schedule.record_capture(0.3, 5.0)  # beside a first, slow step
    assert schedule.interval == 10
    schedule.record_step_time(1.0)
    assert schedule.interval == 50


def test_one_slow_capture_makes_no_gap() -> None:
    schedule = CaptureSchedule(None, 0.01)
    for seconds in (0.02, 9.0):
        schedule.record_capture(seconds, 1.0)
    assert schedule.interval == 2
    schedule.record_capture(9.0, 1.0)  # it stays dear
    assert schedule.interval == 1000


def test_the_first_steps_and_the_last_are_due_whatever_they_cost() -> None:
    schedule = CaptureSchedule(None, 0.01, 997, always=100)
    schedule.record_capture(5.0, 1.0)
    assert schedule.interval == 500
    assert [step for step in range(998) if schedule.is_due(step)] == [*range(1, 101), 500, 997]
    assert [step for step in range(998) if CaptureSchedule(400, 0.01, 997, always=100).is_due(step)] == [1, 400, 800]


def test_a_run_of_known_length_has_the_promised_number_of_captures() -> None:
    for total in (24, 100, 934, 20_000):
        schedule = CaptureSchedule(None, 0.0025, total, least=4, most=8)
        assert sum(map(schedule.is_due, range(1, total + 1))) in range(4, 10)  # with the first step
        schedule.record_capture(1e9, 1.0)
        assert sum(map(schedule.is_due, range(1, total + 1))) in range(2, 6)
    assert CaptureSchedule(None, 0.01, 100_000, most=None).interval == 1
