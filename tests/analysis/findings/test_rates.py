"""Learning rates too high and too low: two signs accuse, one decides nothing, sound runs are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings import Finding

Find = Callable[..., Finding]


def outgrown(run: Any) -> None:
    run.values("adapter_weights", "norm_update")[:] *= 3000


def loss_over_start(run: Any) -> None:
    run.values("loss", "loss")[10:60] += 3


def spikes(run: Any) -> None:
    run.values("optimizer_state", "update_rms_b")[20:200:20] = 5


def deaf(run: Any) -> None:
    for of in "ab":
        run.values("optimizer_state", f"update_rms_{of}")[50:] = 0.01


def ever_harder_clipped(run: Any) -> None:
    run.values("loss", "clip")[:] = np.geomspace(0.5, 0.01, 200)


def diverging(run: Any) -> None:
    run.values("divergence", "kl")[:] = np.linspace(0, 5, 20)
    run.values("evaluation", "loss")[5:] += np.linspace(0, 2, 15)


SIGNS = (outgrown, loss_over_start, spikes, deaf, ever_harder_clipped, diverging)


@pytest.mark.parametrize("sign", SIGNS)
def test_one_sign_decides_nothing_and_two_accuse(finding: Find, healthy: Any, sign: Callable[[Any], None]) -> None:
    sign(healthy)
    one = finding("rate_high", healthy)
    assert one.confidence == "inconclusive" and len(one.evidence["signs"]) == 1 and "half the rate" in one.decide
    other = outgrown if sign is not outgrown else spikes
    other(healthy)
    two = finding("rate_high", healthy)
    assert two.severity in ("problem", "warning") and len(two.evidence["signs"]) == 2


def test_a_loss_that_rises_is_a_problem(finding: Find, healthy: Any) -> None:
    loss_over_start(healthy)
    outgrown(healthy)
    assert finding("rate_high", healthy).severity == "problem"


def test_clipping_every_step_is_no_sign(finding: Find, healthy: Any) -> None:
    """The packaged model trains best so."""
    healthy.values("loss", "clip")[:] = np.random.default_rng(0).uniform(0.01, 0.9, 200)
    assert finding("rate_high", healthy).severity == "fine"


def test_a_second_moment_that_is_left_behind_where_the_loss_is_gone_is_no_sign(finding: Find, healthy: Any) -> None:
    deaf(healthy)
    healthy.values("loss", "loss")[:] = np.geomspace(3, 0.01, 200)
    assert finding("rate_high", healthy).severity == "fine"


def test_spikes_are_set_against_the_runs_own_level_and_take_more_than_two_steps(finding: Find, healthy: Any) -> None:
    """Of a short run, one step is more than a percent."""
    for at in (30, 90):
        healthy.values("optimizer_state", "update_rms_b")[at] = 5
    assert finding("rate_high", healthy).severity == "fine"
    healthy.values("optimizer_state", "update_rms_b")[150] = 5
    assert "3 times its usual level in 2%" in finding("rate_high", healthy).measured
    for of in "ab":
        healthy.values("optimizer_state", f"update_rms_{of}")[:] *= 3
    healthy.values("optimizer_state", "update_rms_b")[[30, 90, 150]] = 5
    assert finding("rate_high", healthy).severity == "fine"


def test_an_easy_first_batch_makes_no_rise_of_the_rest(finding: Find, healthy: Any) -> None:
    losses = healthy.values("loss", "loss")
    losses[:] = 3 + np.random.default_rng(0).normal(0, 0.05, 200)
    losses[0] = 2.5
    assert finding("rate_high", healthy).severity == "fine"


def test_one_bad_batch_is_no_sign(finding: Find, healthy: Any) -> None:
    healthy.values("loss", "loss")[100] = 4
    assert finding("rate_high", healthy).severity == "fine"


def test_an_update_that_goes_back_and_forth_is_a_sign(finding: Find, healthy: Any) -> None:
    """At the end it is nearer to its start than a random walk of 200 steps, 0.07 of its path, would be."""
    healthy.values("adapter_weights", "norm_update")[:] = 0.03 * np.cumsum(
        healthy.values("adapter_weights", "norm_step"), 0
    )
    found = finding("rate_high", healthy)
    assert found.confidence == "inconclusive" and "random walk" in found.measured and "rate" in found.decide


def slow(run: Any) -> None:
    """Straight ahead, the loss falling with each step alike."""
    steps = np.arange(1, 201)
    noise = np.random.default_rng(0).normal(0, 0.01, 200)
    run.values("loss", "loss")[:] = 3 - 0.002 * steps + noise
    run.values("adapter_weights", "norm_update")[:] = np.cumsum(run.values("adapter_weights", "norm_step"), 0)
    run.values("adapter_gradients", "cosine_mean")[:] = 0.6


def test_a_slow_straight_run_is_too_low(finding: Find, healthy: Any) -> None:
    slow(healthy)
    found = finding("rate_low", healthy)
    assert (found.severity, found.confidence) == ("warning", "likely")
    assert found.evidence["straightness"] == pytest.approx(1, abs=0.02)


def test_a_rate_at_which_the_loss_never_fell_is_too_low(finding: Find, healthy: Any) -> None:
    slow(healthy)
    noise = np.random.default_rng(0)
    healthy.values("loss", "loss")[:] = 3 + noise.normal(0, 0.05, 200)
    healthy.values("evaluation", "loss")[:] = 3 + noise.normal(0, 0.004, 20)
    healthy.values("divergence", "kl")[:] = 1e-4
    assert finding("rate_low", healthy).severity == "warning"


def test_of_every_tenth_step_the_path_is_the_same(finding: Find, sound: Any) -> None:
    """As the store thins a long run."""
    run = sound(steps=2000)
    run.values("adapter_weights", "norm_update")[:] = np.cumsum(run.values("adapter_weights", "norm_step"), 0)
    whole = finding("rate_low", run, total_steps=2000).evidence["straightness"]
    steps, columns = run.tables["adapter_weights"]
    run.tables["adapter_weights"] = (steps[9::10], {measure: values[9::10] for measure, values in columns.items()})
    assert finding("rate_low", run, total_steps=2000).evidence["straightness"] == pytest.approx(whole, rel=0.01)


def test_a_straight_run_whose_loss_has_settled_is_not_too_low(finding: Find, healthy: Any) -> None:
    slow(healthy)
    healthy.values("loss", "loss")[:] = 2 + np.random.default_rng(0).normal(0, 0.01, 200)
    healthy.values("evaluation", "loss")[:] = 2 + np.random.default_rng(1).normal(0, 0.004, 20)
    assert finding("rate_low", healthy).severity == "fine"


def test_a_straight_run_is_not_cleared_while_its_loss_is_too_noisy_to_have_settled(finding: Find, healthy: Any) -> None:
    slow(healthy)
    noise = np.random.default_rng(0)
    healthy.values("loss", "loss")[:] = 2 + noise.normal(0, 0.3, 200)
    healthy.values("evaluation", "loss")[:] = 2 + noise.normal(0, 0.1, 20)
    assert finding("rate_low", healthy).confidence == "inconclusive"
    healthy.values("loss", "loss")[0], healthy.values("evaluation", "loss")[:] = 9, 0.1 + noise.normal(0, 0.1, 20)
    assert finding("rate_low", healthy).severity == "fine"  # solved: the gradient is gone


def test_falling_and_straight_with_no_other_sign_decides_nothing(finding: Find, healthy: Any) -> None:
    slow(healthy)
    healthy.values("adapter_gradients", "cosine_mean")[:] = 0.1
    found = finding("rate_low", healthy)
    assert found.confidence == "inconclusive" and "three times the rate" in found.decide
    healthy.values("divergence", "kl")[:] = 0.001
    assert finding("rate_low", healthy).severity == "warning"
