"""A run is judged on the rows that it did not train on, as it trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens import TrainingWrapper
from training_lens.config.schema import EvaluationSection
from training_lens.errors import ConfigurationError
from training_lens.evaluation.judging import compare_run
from training_lens.utils.progress import Progress
from training_lens.utils.runs import RunFolder

ROWS = [{"question": f"What is {i} plus 1?", "answer": f"{i} plus 1 is {i + 1}."} for i in range(30)]


def trained(small_config: Callable[..., Any], write_rows: Callable[..., Path], **data: Any) -> tuple[RunFolder, Any]:
    config = small_config(data={"train": str(write_rows(ROWS)), **data}, training={"max_steps": 2})
    summary = TrainingWrapper(config).train()
    return RunFolder(Path(summary.run_dir)), summary


def test_held_out_rows_are_those_that_training_left_out(
    small_config: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    run, summary = trained(small_config, write_rows, val_ratio=0.3, max_examples=None)
    judgement = compare_run(run, EvaluationSection(), Progress())
    assert [e.id for e in judgement.examples] == run.read_metadata("held_out.json")
    assert len(judgement.examples) == 9
    assert judgement.comparison.adapter.loss == pytest.approx(summary.validation_loss, rel=1e-5)
    assert judgement.comparison.base.loss == pytest.approx(summary.base_validation_loss, rel=1e-5)
    assert judgement.comparison.wrong_domain is None


def test_a_run_without_validation_rows_cannot_be_judged(
    small_config: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    run, _ = trained(small_config, write_rows)
    with pytest.raises(ConfigurationError, match="had no validation rows"):
        compare_run(run, EvaluationSection(), Progress())
