"""Whether answers depend on their prompts is not guessed: a comparison's control says it, or swapped prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings.label_noise import check_label_noise
from training_lens.analysis.findings.prompt_use import check_prompt_use
from training_lens.core.recording import Recording
from training_lens.evaluation.verdict import Remark, Verdict
from training_lens.utils.integrity import write_sealed

Build = Callable[..., Recording]


@pytest.fixture
def recording(record: Build) -> Build:
    """A run that captured these values of the table `evaluation` at its end."""

    def build(**measured: float) -> Recording:
        table = {name: np.array([value]) for name, value in measured.items()}
        return record({"evaluation": (np.array([8]), table)} if table else {})

    return build


def write_comparison(run: Recording, code: str, severity: Any, steps: int = 8) -> Recording:
    """A run of 8 steps that was compared after `steps` of them."""
    remark = Remark(code, severity, "with the prompts of other rows its loss is 3")
    verdict = Verdict("better", "Better.", "comparison", "loss", remarks=(remark,)).as_json()
    for name, values in (("reports/compare", {"verdict": verdict, "steps": steps}), ("metadata/summary", {"steps": 8})):
        (run.folder / name).parent.mkdir(exist_ok=True)
        write_sealed(run.folder / f"{name}.json", values)
    return run


@pytest.mark.parametrize(
    ("code", "severity", "confidence"),
    [
        ("prompt_used", "fine", "sure"),
        ("prompt_hardly_used", "warning", "sure"),
        ("prompt_ignored", "problem", "sure"),
        ("prompt_unknown", "note", "inconclusive"),
    ],
)
def test_the_finding_is_what_the_comparison_measured(
    recording: Build, code: str, severity: Any, confidence: str
) -> None:
    found = check_prompt_use(write_comparison(recording(), code, severity))
    assert (found.severity, found.confidence) == (severity, confidence)
    assert found.measured == "with the prompts of other rows its loss is 3"


def test_without_a_comparison_of_this_adapter_it_is_named(recording: Build) -> None:
    for run in (recording(), write_comparison(recording(), "prompt_used", "fine", steps=4)):
        found = check_prompt_use(run)
        assert found.confidence == "inconclusive" and "training-lens compare" in found.decide


@pytest.mark.parametrize(
    ("gain", "base", "severity", "confidence"),
    [
        (0.5, 0.3, "fine", "likely"),
        (0.02, 0.3, "warning", "likely"),  # the base reads its prompts, the adapter does not
        (0.02, 0.03, "note", "inconclusive"),  # neither does: a small model, or rows that need no prompt
        (-0.1, 0.0, "note", "inconclusive"),
    ],
)
def test_swapped_prompts_decide_where_they_can(
    recording: Build, gain: float, base: float, severity: str, confidence: str
) -> None:
    values = {"loss": 2.0, "swap_gain": gain, "swap_error": 0.02, "base_swap_gain": base, "base_swap_error": 0.02}
    found = check_prompt_use(recording(**values, swap_rows=32))
    assert (found.severity, found.confidence) == (severity, confidence) and "32 held-out answers" in found.measured


def test_training_answers_that_gain_less_from_their_prompts_than_held_out_ones_are_of_other_rows(
    recording: Build,
) -> None:
    values = {"swap_gain": 1.0, "swap_error": 0.05, "train_swap_error": 0.05}
    noisy = check_label_noise(recording(**values, train_swap_gain=0.6))
    assert noisy.severity == "warning" and "40% of the training answers" in noisy.measured
    for of_train in ({"train_swap_gain": 0.95}, {"train_swap_gain": 1.4}, {}):
        found = check_label_noise(recording(**values, **of_train))
        assert found.confidence == "inconclusive" and "30 random training rows" in found.decide
