"""Memorization and convergence: what the held-out loss does beside the training loss, and what is left to gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings import Finding

Find = Callable[..., Finding]
STEPS = np.arange(10, 201, 10)


def stairs(run: Any, height: float = 0.4) -> None:
    noise = np.random.default_rng(1).normal(0, 0.05, 200)
    run.values("loss", "loss")[:] = 3 - height * ((np.arange(1, 201) - 1) // 50) + noise


def held_out(run: Any, late: np.ndarray) -> None:
    run.values("evaluation", "loss")[:] = late + np.random.default_rng(2).normal(0, 0.004, 20)


def test_stairs_and_a_rising_held_out_loss_are_memorization(finding: Find, healthy: Any) -> None:
    stairs(healthy)
    held_out(healthy, 2 + np.abs(np.log(STEPS / 50)) * 0.2)
    found = finding("memorization", healthy, steps_per_epoch=50)
    assert (found.severity, found.confidence) == ("warning", "likely")
    assert found.evidence["best_step"] == 50
    assert found.evidence["drop"] == pytest.approx(0.4, abs=0.05)


def test_so_is_a_held_out_loss_that_stays_far_above_its_best(finding: Find, healthy: Any) -> None:
    held_out(healthy, np.where(STEPS < 60, 2.3 - 0.01 * STEPS, 2.1))
    found = finding("memorization", healthy, steps_per_epoch=1)
    assert found.severity == "warning" and found.evidence["best_step"] == 50


def test_without_stairs_a_falling_training_loss_beside_a_rising_one_is_too(finding: Find, healthy: Any) -> None:
    """As with epochs of one or two steps."""
    held_out(healthy, 2 + np.abs(np.log(STEPS / 50)) * 0.2)
    found = finding("memorization", healthy, steps_per_epoch=1)
    assert found.severity == "warning" and "no drop at an epoch end could be measured" in found.measured


def test_stairs_beside_a_held_out_loss_that_falls_are_fine(finding: Find, healthy: Any) -> None:
    stairs(healthy)
    assert finding("memorization", healthy, steps_per_epoch=50).severity == "fine"


def test_stairs_beside_a_flat_held_out_loss_are_a_note(finding: Find, healthy: Any) -> None:
    stairs(healthy)
    held_out(healthy, np.full(20, 2.0))
    found = finding("memorization", healthy, steps_per_epoch=50)
    assert found.severity == "note" and found.confidence == "likely"


def test_one_epoch_memorizes_nothing(finding: Find, healthy: Any) -> None:
    held_out(healthy, 2 + np.abs(np.log(STEPS / 50)) * 0.2)
    assert finding("memorization", healthy, steps_per_epoch=200).severity == "fine"


@pytest.mark.parametrize(
    ("visits", "confidence"), [(None, "likely"), (1, "sure"), (1.02, "likely"), (8, "inconclusive")]
)
def test_one_epoch_of_repeated_rows_is_not_called_one_visit(
    finding: Find, healthy: Any, visits: float | None, confidence: str
) -> None:
    known = {} if visits is None else {"visits_per_epoch": visits, "distinct_examples": 100}
    if visits == 8:
        del healthy.tables["evaluation"], healthy.tables["divergence"]
    found = finding("memorization", healthy, steps_per_epoch=200, **known)
    assert (found.confidence, found.severity == "fine") == (confidence, visits != 8)


@pytest.mark.parametrize(
    ("end", "severity", "confidence"),
    [(0.1, "note", "likely"), (0.7, "note", "inconclusive"), (1.1, "fine", "likely")],
)
def test_a_wide_gap_counts_while_the_held_out_loss_falls(
    finding: Find, healthy: Any, end: float, severity: str, confidence: str
) -> None:
    healthy.values("loss", "loss")[:] = np.linspace(3, end, 200)  # the held-out loss ends at 1.25
    found = finding("memorization", healthy, steps_per_epoch=50)
    assert (found.severity, found.confidence) == (severity, confidence) and "of the held-out loss" in found.measured


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_rows_that_were_easier_before_training_are_no_memorization(finding: Find, healthy: Any, scale: float) -> None:
    evaluation = healthy.tables["evaluation"][1]
    evaluation["base_loss"] = np.full(20, 3.2 * scale)
    evaluation["loss"] = evaluation["loss"] * scale  # from 3.2 to 1.25, where the scale is 1
    healthy.values("loss", "loss")[:] = np.linspace(1.6, 0.6, 200) * scale
    assert finding("memorization", healthy, steps_per_epoch=50).severity == "fine"


def test_stairs_without_held_out_rows_decide_nothing(finding: Find, healthy: Any) -> None:
    stairs(healthy)
    del healthy.tables["evaluation"], healthy.tables["divergence"]
    found = finding("memorization", healthy, steps_per_epoch=50)
    assert found.confidence == "inconclusive" and "data.val_ratio" in found.decide


def test_the_steps_of_an_epoch_are_known_from_the_loop_too(finding: Find, healthy: Any) -> None:
    stairs(healthy)
    held_out(healthy, 2 + np.abs(np.log(STEPS / 50)) * 0.2)
    healthy.values("loss", "epoch")[:] = np.arange(1, 201) / 50
    found = finding("memorization", healthy, steps_per_epoch=None)
    assert found.severity == "warning" and "3 epoch ends" in found.measured


def keep_rate(run: Any) -> None:
    run.values("loss", "lr")[:] = 1e-3


@pytest.mark.parametrize("late", [3.1 - 0.35 * np.log(STEPS), np.full(20, 2.0)], ids=["falls", "is flat"])
def test_a_curve_under_a_falling_rate_is_not_extended(finding: Find, healthy: Any, late: np.ndarray) -> None:
    """It flattens by itself: a run of twice the steps has a higher rate there."""
    held_out(healthy, late)
    found = finding("converged", healthy)
    assert (found.severity, found.confidence) == ("note", "inconclusive")
    assert "--test epoch" in found.decide and "would change" not in found.measured


@pytest.mark.parametrize(
    ("changed", "is_foretold"),
    [({}, True), ({"total_steps": 300}, False), ({"status": "running"}, False), ({"status": "interrupted"}, False)],
    ids=["whole", "stopped early", "running", "interrupted"],
)
def test_a_run_that_took_its_schedule_to_the_end_has_a_forecast_of_twice_the_steps(
    finding: Find, healthy: Any, changed: dict[str, Any], is_foretold: bool
) -> None:
    held_out(healthy, 3.1 - 0.35 * np.log(STEPS))
    healthy.tables["evaluation"][1]["base_loss"] = np.full(len(STEPS), 5.0)
    found = finding("converged", healthy, **changed)
    assert ("forecast" in found.evidence) is ("a run of twice the steps" in found.measured) is is_foretold
    assert found.confidence == "inconclusive", "an interval that holds 0 decides nothing"
    if is_foretold:
        assert found.evidence["forecast"]["low"] < 0 < found.evidence["forecast"]["high"]


def test_a_falling_loss_at_a_steady_rate_is_not_converged(finding: Find, healthy: Any) -> None:
    keep_rate(healthy)
    found = finding("converged", healthy)
    assert found.confidence == "inconclusive" and "falls from step 110 to 200" in found.measured


def test_a_flat_loss_at_a_steady_rate_is_converged(finding: Find, healthy: Any) -> None:
    keep_rate(healthy)
    held_out(healthy, np.full(20, 2.0))
    found = finding("converged", healthy)
    assert (found.severity, found.title) == ("fine", "Converged")


def test_a_run_that_goes_on_is_told_to_stop(finding: Find, healthy: Any) -> None:
    keep_rate(healthy)
    held_out(healthy, np.full(20, 2.0))
    found = finding("converged", healthy, status="running", total_steps=300)
    assert found.severity == "note" and "stop here" in found.action


def test_a_rising_loss_is_nothing_to_wait_for_at_any_rate(finding: Find, healthy: Any) -> None:
    held_out(healthy, 2 + np.abs(np.log(STEPS / 50)) * 0.2)
    found = finding("converged", healthy)
    assert found.title == "The held-out loss no longer falls" and found.severity == "fine"


def test_few_noisy_losses_decide_nothing(finding: Find, healthy: Any) -> None:
    keep_rate(healthy)
    noisy = np.array([2.0, 1.9, 1.95, 1.85])
    healthy.tables["evaluation"] = (STEPS[-4:], {"loss": noisy})
    assert finding("converged", healthy).confidence == "inconclusive"


@pytest.mark.parametrize(("points", "is_said"), [(3, True), (4, False)])
def test_four_held_out_losses_are_the_least(finding: Find, healthy: Any, points: int, is_said: bool) -> None:
    for name in ("evaluation", "divergence"):
        steps, columns = healthy.tables[name]
        healthy.tables[name] = (steps[-points:], {key: values[-points:] for key, values in columns.items()})
    assert ("at least 4 held-out losses" in finding("converged", healthy).decide) is is_said


def test_an_unknown_rate_decides_nothing(finding: Find, healthy: Any) -> None:
    del healthy.tables["loss"][1]["lr"]
    held_out(healthy, np.full(20, 2.0))
    assert finding("converged", healthy).confidence == "inconclusive"


def test_the_probe_set_stands_in_for_rare_validations(finding: Find, healthy: Any) -> None:
    steps, columns = healthy.tables["evaluation"]
    healthy.tables["evaluation"] = (steps[-2:], {"loss": columns["loss"][-2:]})
    assert "the loss on the probe set" in finding("converged", healthy).measured


def test_a_run_without_stairs_is_not_said_to_have_one_downwards_or_upwards(finding: Find, healthy: Any) -> None:
    measured = finding("memorization", healthy).measured
    assert "no significant drop at an epoch end" in measured and "drops by" not in measured
