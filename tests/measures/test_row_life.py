"""The life of a row: identities of its measures, and counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from training_lens.measures.row_life import (
    LEARNED,
    choose_threshold,
    describe_lives,
    find_components,
    group_by_length,
    score_outliers,
    score_wrong_answers,
)

NO = np.nan


def losses_of(*probabilities: list[float]) -> np.ndarray:
    """Losses per token of rows with these probabilities at their visits."""
    longest = max(map(len, probabilities))
    return -np.log(np.array([[*row, *[NO] * (longest - len(row))] for row in probabilities]))


def test_a_constant_series_has_no_variability_and_its_own_probability() -> None:
    found = describe_lives(losses_of([0.7] * 5, [0.2] * 5), 0.5)
    assert found.variability == pytest.approx([0, 0], abs=1e-12) and found.spread == pytest.approx([0, 0], abs=1e-12)
    assert found.confidence == pytest.approx([0.7, 0.2])
    assert found.log_probability == pytest.approx(np.log([0.7, 0.2]))


def test_learned_and_forgotten_are_counted_by_hand() -> None:
    found = describe_lives(
        losses_of([0.1, 0.6, 0.4, 0.9, 0.3], [0.9, 0.9, 0.9], [0.1, 0.2], [0.6], [0.1, 0.1, 0.8]), 0.5
    )
    assert found.visits.tolist() == [5, 3, 2, 1, 3]
    assert found.first_learned.tolist() == [1, 0, -1, 0, 2]
    assert found.forgotten.tolist() == [2, 0, 0, 0, 0]  # the end of a series forgets nothing
    assert found.is_learned.tolist() == [False, True, False, True, True]
    assert found.last_loss == pytest.approx(-np.log([0.3, 0.9, 0.2, 0.6, 0.8]))
    assert np.isnan(found.variability[3]) and found.variability[2] == pytest.approx(0.05)


def test_the_threshold_is_a_half_where_rows_reach_it_and_their_median_elsewhere() -> None:
    assert choose_threshold(-np.log(np.array([0.9, 0.6, 0.1, 0.2]))) == LEARNED
    assert choose_threshold(-np.log(np.array([0.1, 0.2, 0.3]))) == pytest.approx(0.2)


def test_an_outlier_is_measured_in_robust_deviations_of_its_group() -> None:
    values = np.array([1.0, 2.0, 3.0, 103.0, 10.0, 10.0])
    found = score_outliers(values, np.array([0, 0, 0, 0, 1, 1]))
    assert found[3] == pytest.approx(100.5 / (1.4826 * 1.0)) and found[4:].tolist() == [0, 0]
    assert group_by_length(np.array([1, 1, 1, 5, 9, 9]), 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert set(group_by_length(np.full(7, 3), 4)) == {group_by_length(np.full(7, 3), 4)[0]}


@pytest.mark.parametrize("visits", [1, 3])
def test_rows_that_others_speak_against_score_highest(visits: int) -> None:
    generator = np.random.default_rng(0)
    losses = np.abs(generator.normal(0.3, 0.05, (300, visits)))
    losses[:6] += 2.0
    steps = generator.permutation(300)[:, None] // 4 + 1 + 75 * np.arange(visits)
    scores = score_wrong_answers(losses, steps, generator.integers(5, 30, 300))
    assert set(np.argsort(-scores)[:6].tolist()) == set(range(6)) and scores[:6].min() > 3.5


@pytest.mark.parametrize("visits", [1, 2])
def test_an_early_row_is_not_wrong_because_the_run_had_not_learned_yet(visits: int) -> None:
    generator = np.random.default_rng(1)
    steps = np.arange(320)[:, None] // 8 + 1 + 40 * np.arange(visits)  # 8 rows a step
    losses = 2 + 9 * np.exp(-steps / 4) + generator.normal(0, 0.2, steps.shape)
    scores = score_wrong_answers(losses, steps, np.full(320, 10))
    assert (scores > 3.5).mean() < 0.02, "clean rows are no suspects, though the first have five times the loss"
    losses[40] += 2.0
    assert score_wrong_answers(losses, steps, np.full(320, 10)).argmax() == 40


def test_components_are_those_of_the_pairs() -> None:
    pairs = np.array([[4, 5], [1, 2], [2, 4]])
    assert find_components(7, pairs).tolist() == [0, 1, 1, 3, 1, 1, 6]
    assert find_components(2, np.zeros((0, 2), dtype=np.int64)).tolist() == [0, 1]
