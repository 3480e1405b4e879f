"""An estimate is measured on the run's own steps, whole or thin, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens.training import estimates
from training_lens.training.estimates import estimate_run, padded_tokens
from training_lens.training.wrapper import TrainingWrapper


def test_an_estimate_has_all_its_parts_and_writes_nothing(small_config: Callable[..., Any], tmp_path: Path) -> None:
    plan = TrainingWrapper(small_config()).plan()
    before = sorted(tmp_path.rglob("*"))
    estimate = estimate_run(plan)
    assert estimate is not None and sorted(tmp_path.rglob("*")) == before
    assert estimate.seconds > 0 and estimate.validation_seconds > 0 and estimate.measured_steps >= 1
    assert estimate.peak_bytes > 4 * plan.parameters and estimate.layers == ()


def test_more_steps_are_estimated_to_take_longer(small_config: Callable[..., Any]) -> None:
    once, often = (estimate_run(TrainingWrapper(small_config(training={"epochs": e})).plan()) for e in (1, 20))
    assert once is not None and often is not None and often.seconds > 4 * once.seconds


def test_a_large_model_is_measured_thin(small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "WHOLE_BELOW", 0)
    estimate = estimate_run(TrainingWrapper(small_config()).plan())
    assert estimate is not None and estimate.layers == (1, 3) and estimate.seconds > 0


def test_what_cannot_be_measured_is_said(
    small_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(estimates, "WHOLE_BELOW", 0)
    plan = TrainingWrapper(small_config()).plan()
    quantized = plan.config.model_copy(update={"model": plan.config.model.model_copy(update={"quantization": "4bit"})})
    object.__setattr__(plan, "config", quantized)
    assert estimate_run(plan) is None


def test_padded_tokens_cover_the_tokens(small_config: Callable[..., Any]) -> None:
    plan = TrainingWrapper(small_config()).plan()
    for step in plan.schedule.steps():
        assert padded_tokens(plan, step) >= int(plan.train.lengths[step.examples].sum())
    assert int(np.sum(plan.train.lengths)) == plan.numbers()["tokens"]
