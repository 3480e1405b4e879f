"""How measured changes decide findings: what is better, what is fine, what stays open, and the interval behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings import Finding, Intervention, SettingChange, read_interventions
from training_lens.analysis.findings.interventions import list_open_questions, measure_changes, write_interventions
from training_lens.core.recording import Recording

GAIN = 1.0
BETTER = SettingChange("", "", (-0.2, -0.22), -0.21, -0.25, -0.17)
NOISY = SettingChange("", "", (-0.2, 0.1), -0.05, -0.4, 0.3)
WORSE = SettingChange("", "", (0.2, 0.22), 0.21, 0.17, 0.25)
SAME = SettingChange("", "", (0.001, 0.002), 0.0015, -0.01, 0.013)


def answer(question: Any, steps: int = 200, **changes: SettingChange) -> Intervention:
    named = tuple(replace(change, name=name, setting=f"set {name}") for name, change in changes.items())
    return Intervention(question, steps, 200, (0, 1), 64, base_loss=3.0, loss=2.0, changes=named)


@pytest.fixture
def decide(healthy: Any, record: Callable[..., Recording], checks: dict[str, Any]) -> Callable[..., Finding]:
    """The finding of a code for a sound recording with these answers beside it."""

    def find(code: str, *answers: Intervention) -> Finding:
        recording = record(healthy.tables, {"total_steps": 200, "steps_per_epoch": 100})
        write_interventions(recording.folder, answers)
        found: Finding = checks[code](recording)
        return found

    return find


@pytest.mark.parametrize(
    ("code", "given", "severity", "words"),
    [
        ("rate_low", answer("rate", higher=BETTER, lower=WORSE), "warning", "set higher"),
        ("rate_low", answer("rate", higher=SAME, lower=WORSE), "fine", ""),
        ("rate_low", answer("rate", higher=SettingChange("", "", failure="not finite")), "fine", ""),
        ("rate_high", answer("rate", higher=WORSE, lower=BETTER), "warning", "set lower"),
        ("rate_high", answer("rate", higher=WORSE, lower=SAME), "fine", ""),
        ("rank", answer("rank", doubled=BETTER, halved=WORSE), "warning", "set doubled"),
        ("rank", answer("rank", doubled=SAME, halved=SAME), "note", "set halved"),
        ("rank", answer("rank", doubled=SAME, halved=WORSE), "fine", ""),
        ("converged", answer("epoch", continued=BETTER), "note", "set continued"),
        ("converged", answer("epoch", continued=WORSE), "fine", ""),
    ],
)
def test_a_measured_change_decides(decide: Any, code: str, given: Intervention, severity: str, words: str) -> None:
    found = decide(code, given)
    assert (found.severity, found.confidence) == (severity, "sure")
    assert words in found.action and bool(found.action) == bool(words)


@pytest.mark.parametrize(
    ("code", "given"), [("rate_low", answer("rate", higher=NOISY)), ("converged", answer("epoch", continued=NOISY))]
)
def test_a_change_within_the_noise_is_never_fine(decide: Any, code: str, given: Intervention) -> None:
    found = decide(code, given)
    assert found.confidence == "inconclusive" and "within the noise" in found.measured and found.decide


@pytest.mark.parametrize(
    ("code", "given", "is_decided"),
    [
        ("rate_low", answer("rate", 20, higher=BETTER), False),  # a shorter run likes higher rates
        ("rate_low", answer("rate", 20, higher=WORSE), True),
        ("rate_high", answer("rate", 20, lower=BETTER), True),
        ("rate_high", answer("rate", 20, lower=WORSE), False),
        ("rank", answer("rank", 20, doubled=BETTER), True),
        ("rank", answer("rank", 20, doubled=SAME), False),  # a longer run has more to hold
        ("rate_low", answer("rate", 50, higher=BETTER), True),
    ],
)
def test_runs_that_are_too_short_decide_what_their_bias_cannot_explain(
    decide: Any, code: str, given: Intervention, is_decided: bool
) -> None:
    found = decide(code, given)
    assert (found.confidence == "likely") is is_decided
    assert is_decided or "--test-steps 50" in found.decide


@pytest.mark.parametrize(("of_rate", "is_decided"), [(-0.3, False), (-0.1, True)])
def test_a_larger_rank_that_gains_less_than_a_higher_rate_decides_nothing(
    decide: Any, of_rate: float, is_decided: bool
) -> None:
    higher = SettingChange("", "", (of_rate, of_rate), of_rate, of_rate - 0.02, of_rate + 0.02)
    found = decide("rank", answer("rate", higher=higher), answer("rank", doubled=BETTER, halved=SAME))
    assert (found.confidence != "inconclusive") is is_decided
    assert is_decided or (found.title == "The rank may be too small" and "a run with set higher" in found.decide)


@pytest.mark.parametrize(("steps", "change", "title"), [
    (50, SAME, "The gain from one more epoch is unknown"),
    (200, SAME, "Converged"),
    (50, BETTER, "One more epoch lowers the loss"),
])  # fmt: skip
def test_a_part_of_an_epoch_does_not_show_that_the_whole_gains_nothing(
    decide: Any, steps: int, change: SettingChange, title: str
) -> None:
    found = decide("converged", answer("epoch", steps, continued=change))
    assert found.title == title
    if steps == 50:
        assert found.confidence == "likely" or "--test epoch --test-steps 200" in found.decide


def test_a_gain_too_small_to_matter_is_fine(decide: Any) -> None:
    small = SettingChange("", "", (-0.02, -0.02), -0.02, -0.021, -0.019)  # of a gain of 1
    assert decide("rate_low", answer("rate", higher=small)).severity == "fine"


def test_a_run_that_shows_a_problem_keeps_it(
    healthy: Any, record: Callable[..., Recording], checks: dict[str, Any]
) -> None:
    healthy.values("loss", "loss")[100:] += 3
    healthy.values("adapter_weights", "norm_update")[:] *= 1e4
    recording = record(healthy.tables, {"total_steps": 200})
    write_interventions(recording.folder, [answer("rate", lower=SAME)])
    found = checks["rate_high"](recording)
    assert found.severity == "problem" and "set lower" in found.measured


def test_an_answer_replaces_the_earlier_one_to_its_question_alone(tmp_path: Path) -> None:
    rate, rank = answer("rate", higher=BETTER), answer("rank", doubled=SAME)
    write_interventions(tmp_path / "lens", [rate])
    write_interventions(tmp_path / "lens", [rank, replace(rate, steps=20)])
    assert read_interventions(tmp_path) == {"rate": replace(rate, steps=20), "rank": rank}


def test_damaged_answers_are_passed_over_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "interventions.json").write_text('{"rate": {"question": "rate"}}')
    assert read_interventions(tmp_path) == {} and "analyze --test" in caplog.text


def test_an_open_finding_names_the_test_and_the_test_is_listed(decide: Any) -> None:
    found = decide("targets")
    assert found.confidence == "inconclusive"
    assert list_open_questions([found]) == ("targets",)
    assert list_open_questions([replace(found, confidence="likely")]) == ()


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Losses with an effect of -0.1, noise of rows and of seeds; by chance 2000 intervals differ from 95 % by 1 %."""
    random, inside, draws = np.random.default_rng(0), 0, 2000
    for _ in range(draws):
        tokens = random.integers(5, 50, 64)
        rows = random.normal(0, 0.3, 64) * tokens  # of both seeds alike
        noise = random.normal(0, 0.05, (2, 2, 1)) * tokens  # of the changes and seeds
        control = random.normal(50, 5, (2, 64))
        changed, other = control - 0.1 * tokens + rows + noise[0], control + noise[1]
        change, _ = measure_changes({"a": "a", "b": "b"}, control, {"a": changed, "b": other}, tokens)
        assert change.low is not None and change.high is not None
        inside += change.low <= -0.1 <= change.high
    assert 0.93 < inside / draws < 0.99


def test_rows_alone_give_the_interval_where_seeds_agree() -> None:
    tokens, change = np.full(100, 10), np.random.default_rng(1).normal(-1, 2, 100)
    control = np.zeros((2, 100))
    (found,) = measure_changes({"a": "x=1"}, control, {"a": np.stack([change, change])}, tokens)
    assert found.delta == pytest.approx(change.mean() / 10) and found.high is not None and found.low is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * change.std(ddof=1) / np.sqrt(100) / 10, rel=1e-3)
