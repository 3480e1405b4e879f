"""Whether answers depend on their prompts is not guessed: the control of a comparison says it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training_lens.analysis.findings.prompt_use import check_prompt_use
from training_lens.evaluation.verdict import Remark, Verdict
from training_lens.utils.integrity import write_sealed


def write_comparison(folder: Path, code: str, severity: Any, steps: int = 8) -> Any:
    """A run of 8 steps that was compared after `steps` of them."""
    remark = Remark(code, severity, "with the prompts of other rows its loss is 3")
    verdict = Verdict("better", "Better.", "comparison", "loss", remarks=(remark,)).as_json()
    for name, values in (("reports/compare", {"verdict": verdict, "steps": steps}), ("metadata/summary", {"steps": 8})):
        (folder / name).parent.mkdir(exist_ok=True)
        write_sealed(folder / f"{name}.json", values)
    return SimpleNamespace(folder=folder)


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
    for recording in (SimpleNamespace(folder=tmp_path), write_comparison(tmp_path, "prompt_used", "fine", steps=4)):
        found = check_prompt_use(recording)
        assert found.confidence == "inconclusive" and "training-lens compare" in found.decide
