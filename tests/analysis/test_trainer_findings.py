"""Live findings in the HF Trainer: raised once, in its words, and they may stop it; a sound run is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.core.test_trainer_callback import trainer_with
from training_lens.analysis import build_findings_callback
from training_lens.core.framework import TrainingLensFramework
from training_lens.errors import ConfigurationError
from training_lens.runs.metrics_log import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SHORT = {"gradient_accumulation_steps": 1, "max_steps": 12}


def test_a_rate_that_is_far_too_high_stops_the_trainer_once(tmp_path: Path) -> None:
    lens = TrainingLensFramework(tmp_path / "lens")
    trainer = trainer_with(lens, tmp_path, **{**SHORT, "max_steps": 60, "learning_rate": 0.5})
    trainer.add_callback(build_findings_callback(lens, stop_on=["rate_high"]))
    trainer.train()
    lines = read_metrics(tmp_path / "lens" / "findings.jsonl", 0)
    raised = [line for line in lines if line["event"] == "raised" and line["code"] == "rate_high"]
    assert len(raised) == 1 and raised[0]["step"] == trainer.state.global_step < 60
    assert "learning_rate" in raised[0]["action"] and "training.lr" not in raised[0]["action"]


@pytest.mark.slow
def test_findings_change_no_bit_of_a_sound_run_and_raise_nothing(tmp_path: Path) -> None:
    weights = []
    for name in ("with", "without"):
        lens = TrainingLensFramework(tmp_path / name)
        trainer = trainer_with(lens, tmp_path, **SHORT)
        if name == "with":
            trainer.add_callback(build_findings_callback(lens))
        trainer.train()
        weights.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *weights))
    assert (tmp_path / "with" / "findings.jsonl").read_text() == ""


def test_only_what_can_be_found_there_may_stop_a_trainer(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'loss_spike' is none of the findings of other trainers"):
        build_findings_callback(TrainingLensFramework(tmp_path / "lens"), stop_on=["loss_spike"])
