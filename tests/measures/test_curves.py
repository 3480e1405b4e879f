"""Fits recover the curves that were generated, and noise stays within the standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

from training_lens.measures import curves as convergence

checked = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))  # an int is a float, too
trend, remaining_gain = checked(convergence.log_slope), checked(convergence.remaining_gain)
robust_z, epoch_drops = checked(convergence.robust_z), checked(convergence.epoch_drops)
point_noise = checked(convergence.point_noise)


def test_a_line_against_the_logarithm_gives_its_slope_without_error() -> None:
    steps = np.arange(1, 50)
    slope, error = trend(steps, 3 - 0.25 * np.log(steps))
    assert slope == pytest.approx(-0.25) and error < 1e-12


def test_the_error_of_a_slope_covers_its_noise() -> None:
    generator, steps = np.random.default_rng(0), np.arange(10, 60)
    found = [trend(steps, 0.5 * np.log(steps) + generator.normal(0, 0.1, 50)) for _ in range(400)]
    away = np.array([(estimate.value - 0.5) / estimate.error for estimate in found])
    assert abs(away.mean()) < 0.2 and away.std() == pytest.approx(1, abs=0.15)


def test_nonfinite_points_are_left_out() -> None:
    steps, values = np.array([0, 1, 2, 4, 8]), np.array([99.0, 1.0, np.nan, 3.0, np.inf])
    slope, error = trend(steps, values)
    assert slope == pytest.approx(2 / math.log(4)) and math.isnan(error)  # two points have no error


@pytest.mark.parametrize("steps", [[], [5], [5, 5, 5]])
def test_an_undetermined_slope_is_nan(steps: list[int]) -> None:
    estimate = trend(np.array(steps, dtype=np.int64), np.ones(len(steps)))
    assert math.isnan(estimate.value) and math.isnan(estimate.error)
    assert math.isnan(remaining_gain(np.array(steps, dtype=np.int64), np.ones(len(steps)), 100).value)


def test_the_remaining_gain_is_that_of_the_line() -> None:
    steps = np.arange(1, 101)
    line = 3 - 0.2 * np.log(steps)
    assert remaining_gain(steps, line, 400).value == pytest.approx(0.2 * math.log(4))
    assert remaining_gain(steps, line, 100).value == remaining_gain(steps, line, 50).value == 0
    assert remaining_gain(steps, -line, 400).value == pytest.approx(-0.2 * math.log(4))  # rising: a loss, not a gain
    noisy = line + np.random.default_rng(0).normal(0, 0.1, 100)
    assert remaining_gain(steps, noisy, 400).error == pytest.approx(trend(steps, noisy).error * math.log(4))


def test_robust_distance_of_normal_values_is_in_standard_deviations() -> None:
    values = np.random.default_rng(0).normal(5, 3, 20001)
    assert np.allclose(robust_z(values), (values - 5) / 3, atol=0.1)
    spiked = np.append(values, 5000.0)
    assert robust_z(spiked)[-1] == pytest.approx(1665, rel=0.03)
    assert robust_z(np.array([1.0, 2.0, 3.0, 4.0, 5.0])).tolist() == pytest.approx(
        [x / 1.4826 for x in (-2, -1, 0, 1, 2)]
    )


def test_robust_distance_at_its_ends() -> None:
    assert robust_z(np.array([2.0, 2.0, 2.0, 3.0])).tolist() == [0.0, 0.0, 0.0, np.inf]
    known = robust_z(np.array([1.0, np.nan, 2.0, np.inf, 3.0, -np.inf]))
    np.testing.assert_allclose(known, [-1 / 1.4826, np.nan, 0, np.inf, 1 / 1.4826, -np.inf])
    assert np.isnan(robust_z(np.full(3, np.nan))).all() and not len(robust_z(np.zeros(0)))


def test_the_noise_of_a_point_is_that_of_its_neighbours_differences() -> None:
    line = 5 - 0.3 * np.arange(7)
    assert point_noise(line) == pytest.approx(0, abs=1e-12)  # an even trend adds nothing
    steps = np.array([0.0, 1.0, 1.0, 3.0, 9.0])  # differences 1, 0, 2, 6: 0.5, 1.5, 0.5, 4.5 from their median
    assert point_noise(steps) == pytest.approx(1.4826 * 1.0 / math.sqrt(2))
    noise = np.random.default_rng(0).normal(0, 0.2, 20_000)
    assert point_noise(noise) == pytest.approx(0.2, rel=0.03)
    assert np.isnan(point_noise(line[:1]))


def staircase(drop: float, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three epochs of 40 steps on a falling line, that fall by `drop` at each epoch's end."""
    steps = np.arange(1, 121)
    return steps, 3 - 0.005 * steps - drop * ((steps - 1) // 40) + np.random.default_rng(seed).normal(0, noise, 120)


def test_a_staircase_shows_its_drops_and_a_line_none() -> None:
    for drop in (0.3, 0.0):
        found = epoch_drops(*staircase(drop, 0), steps_per_epoch=40, window=15)
        assert [place.step for place in found] == [40, 80]
        assert [place.drop for place in found] == pytest.approx([drop, drop], abs=1e-10)


def test_a_bend_at_an_epochs_end_is_no_drop() -> None:
    steps = np.arange(1, 81)
    bent = 3 - 0.01 * np.minimum(steps, 40.5) - 0.001 * np.maximum(steps - 40.5, 0)
    bent[28:34] = np.nan  # with a side shorter than the other, one slope for both would see a drop
    assert epoch_drops(steps, bent, 40, 15)[0].drop == pytest.approx(0, abs=1e-10)


def test_the_error_of_a_drop_covers_its_noise() -> None:
    found = [epoch_drops(*staircase(0.3, 0.1, seed), 40, 20)[0] for seed in range(300)]
    away = np.array([(place.drop - 0.3) / place.error for place in found])
    assert abs(away.mean()) < 0.2 and away.std() == pytest.approx(1, abs=0.15)
    assert np.mean([place.error for place in found]) == pytest.approx(0.1 * math.sqrt(8 / 20), rel=0.1)


def test_the_window_never_reaches_into_another_epoch() -> None:
    found = epoch_drops(*staircase(0.3, 0), steps_per_epoch=40, window=1000)
    assert [place.drop for place in found] == pytest.approx([0.3, 0.3], abs=1e-10)


def test_a_boundary_with_little_around_it_is_left_out() -> None:
    steps, losses = staircase(0.3, 0)
    assert [place.step for place in epoch_drops(steps[:82], losses[:82], 40, 15)] == [40]
    losses[28:40] = np.nan
    assert [place.step for place in epoch_drops(steps, losses, 40, 15)] == [40, 80]  # three are left
    losses[27] = np.nan
    assert [place.step for place in epoch_drops(steps, losses, 40, 15)] == [80]
    assert epoch_drops(steps[:0], losses[:0], 40, 15) == []


def test_epochs_of_a_broken_number_of_steps() -> None:
    steps = np.arange(1, 31)
    found = epoch_drops(steps, np.where(steps > 10, 1.0, 2.0) - (steps > 21), 10.5, 8)
    assert [(place.step, place.drop) for place in found] == [(10, pytest.approx(1)), (21, pytest.approx(1))]
