"""Whether answers depend on their prompts is not guessed: a comparison's control says it, or swapped prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from training_lens.analysis.findings.label_noise import check_label_noise
from training_lens.analysis.findings.prompt_use import check_prompt_use
from training_lens.core.types import Series
from training_lens.evaluation.verdict import Remark, Verdict
from training_lens.utils.integrity import write_sealed


def recording(folder: Path, **measured: float) -> Any:
    """A run that captured these values of the table `evaluation` at its end."""

    def series(table: str, measure: str) -> Series:
        value = measured.get(measure, np.nan) if table == "evaluation" else np.nan
        return Series(np.array([8]), (measure,), np.array([[value]]))

    return SimpleNamespace(folder=folder, series=series)


def write_comparison(folder: Path, code: str, severity: Any, steps: int = 8) -> Any:
    """A run of 8 steps that was compared after `steps` of them."""
    remark = Remark(code, severity, "with the prompts of other rows its loss is 3")
    verdict = Verdict("better", "Better.", "comparison", "loss", remarks=(remark,)).as_json()
    for name, values in (("reports/compare", {"verdict": verdict, "steps": steps}), ("metadata/summary", {"steps": 8})):
        (folder / name).parent.mkdir(exist_ok=True)
        write_sealed(folder / f"{name}.json", values)
    return recording(folder)


@pytest.mark.parametrize(
    ("code", "severity", "confidence"),
    [
        ("prompt_used", "fine", "sure"),
        ("prompt_hardly_used", "warning", "sure"),
        ("prompt_ignored", "problem", "sure"),
        ("prompt_unknown", "note", "inconclusive"),
    ],
)
def test_the_finding_is_what_the_comparison_measured(tmp_path: Path, code: str, severity: Any, confidence: str) -> None:
    found = check_prompt_use(write_comparison(tmp_path, code, severity))
    assert (found.severity, found.confidence) == (severity, confidence)
    assert found.measured == "with the prompts of other rows its loss is 3"


def test_without_a_comparison_of_this_adapter_it_is_named(tmp_path: Path) -> None:
    for run in (recording(tmp_path), write_comparison(tmp_path, "prompt_used", "fine", steps=4)):
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
    tmp_path: Path, gain: float, base: float, severity: str, confidence: str
) -> None:
    values = {"loss": 2.0, "swap_gain": gain, "swap_error": 0.02, "base_swap_gain": base, "base_swap_error": 0.02}
    found = check_prompt_use(recording(tmp_path, **values, swap_rows=32))
    assert (found.severity, found.confidence) == (severity, confidence) and "32 held-out answers" in found.measured


def test_training_answers_that_gain_less_from_their_prompts_than_held_out_ones_are_of_other_rows(
    tmp_path: Path,
) -> None:
    values = {"swap_gain": 1.0, "swap_error": 0.05, "train_swap_error": 0.05}
    noisy = check_label_noise(recording(tmp_path, **values, train_swap_gain=0.6))
    assert noisy.severity == "warning" and "40% of the training answers" in noisy.measured
    for of_train in ({"train_swap_gain": 0.95}, {"train_swap_gain": 1.4}, {}):
        found = check_label_noise(recording(tmp_path, **values, **of_train))
        assert found.confidence == "inconclusive" and "30 random training rows" in found.decide
