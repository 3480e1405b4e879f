"""Exposure: its closed forms on random scores, and continuations counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training_lens.measures.exposure import (
    chance_of_exposure,
    count_leading,
    expected_exposure,
    exposure_deviation,
    find_longest_run,
    measure_exposure,
)


def test_exposure_is_the_rank_in_bits() -> None:
    others = np.arange(1.0, 16.0)
    assert measure_exposure(0.0, others) == 4.0  # the first of 16
    assert measure_exposure(100.0, others) == 0.0  # the last
    assert measure_exposure(7.5, others) == pytest.approx(4 - math.log2(8))
    assert measure_exposure(1.0, np.ones(3)) == pytest.approx(2 - math.log2(2.5))  # ties share their ranks


def test_what_was_never_seen_averages_log2_e_on_random_scores() -> None:
    generator, candidates, canaries = np.random.default_rng(0), 512, 4000
    scores = generator.normal(size=(canaries, candidates))
    found = [measure_exposure(float(row[0]), row[1:]) for row in scores]
    error = exposure_deviation(candidates) / math.sqrt(canaries)
    assert np.mean(found) == pytest.approx(expected_exposure(candidates), abs=4 * error)
    assert np.std(found) == pytest.approx(exposure_deviation(candidates), rel=0.1)


def test_a_verdict_on_few_canaries_knows_how_far_chance_goes() -> None:
    """Of one canary each rank is as likely; of several the bound holds on random ranks and is near."""
    assert [chance_of_exposure(math.log2(64 / rank), 1) for rank in (1, 4)] == pytest.approx([1 / 64, 4 / 64])
    ranks = np.random.default_rng(0).integers(1, 513, (20_000, 4))
    means = (9 - np.log2(ranks)).mean(1)
    for mean in (2.0, 3.0):
        assert (means >= mean).mean() <= chance_of_exposure(mean, 4) + 0.005
        assert (means >= mean).mean() == pytest.approx(chance_of_exposure(mean, 4), rel=0.1)
    assert chance_of_exposure(0.0, 3) == 1.0


def test_the_chance_level_is_the_mean_of_all_ranks_and_grows_to_log2_e() -> None:
    exact = np.mean([math.log2(100) - math.log2(rank) for rank in range(1, 101)])
    assert expected_exposure(100) == pytest.approx(exact)
    assert expected_exposure(10**7) == pytest.approx(math.log2(math.e), abs=1e-5)
    assert exposure_deviation(10**6) == pytest.approx(math.log2(math.e), abs=1e-3)  # as of an exponential variable


def test_continuations_are_counted_by_hand() -> None:
    correct = np.array([True, True, False, True, True, True, False, True])
    assert (count_leading(correct), find_longest_run(correct)) == (2, (3, 3))
    assert (count_leading(correct[:2]), find_longest_run(correct[:2])) == (2, (2, 0))
    assert (count_leading(~correct[:2]), find_longest_run(~correct[:2])[0]) == (0, 0)
