"""The lens on our own loop: what a run keeps of it, and what happens at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.schema import TrainingConfig
from training_lens.core.lens_store import LensStore
from training_lens.errors import ConfigurationError
from training_lens.runs.run_folder import RunFolder
from training_lens.training.lens_callback import count_visits
from training_lens.training.run import TrainingWrapper

Config = Callable[..., TrainingConfig]


@pytest.mark.slow
def test_training_ends_with_three_lines_and_a_report(small_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        summary = TrainingWrapper(small_config(lens={"report": True})).train()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("lens: ")]
    assert len(said) == 4
    report = Path(summary.run_dir) / "reports" / "lens.html"
    assert said[-1] == f"lens: the report is {report}"
    assert report.read_text().rstrip().endswith("</html>")
    assert summary.lens_seconds > 0


def test_without_the_lens_nothing_is_captured(small_config: Config) -> None:
    summary = TrainingWrapper(small_config(lens={"enabled": False, "report": True})).train()
    assert summary.lens_seconds == 0
    assert not RunFolder(Path(summary.run_dir)).lens.exists()
    assert not (Path(summary.run_dir) / "reports" / "lens.html").exists()


@pytest.mark.slow
def test_a_report_that_fails_ends_no_run(
    small_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no picture today")

    monkeypatch.setattr("training_lens.analysis.reports.standard.StandardReports.write", fail)
    assert TrainingWrapper(small_config(lens={"report": True})).train().status == "finished"
    assert "the lens has no report of this run: no picture today" in caplog.text


@pytest.mark.parametrize("tokens", [64, pytest.param(0, marks=pytest.mark.slow)])
def test_the_probe_set_is_as_large_as_asked_for(small_config: Config, tokens: int) -> None:
    summary = TrainingWrapper(small_config(lens={"report": False, "probe_tokens": tokens})).train()
    store = LensStore(RunFolder(Path(summary.run_dir)).lens)
    assert ("divergence" in store.tables()) == (tokens > 0)
    assert (store.manifest.probe or {"tokens": 0})["tokens"] <= tokens
    if tokens:
        assert store.series("divergence", "kl").column("run")[0] == 0  # a fresh adapter is the base
        assert store.series("activations", "drift").values[0].max() == 0


@pytest.mark.parametrize(("weights", "visits"), [(None, 3.0), ([2.0], 6.0)])
def test_a_recording_knows_how_often_an_epoch_visits_a_row(
    small_config: Config, weights: list[float] | None, visits: float
) -> None:
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(4)] * 3
    plan = TrainingWrapper(small_config(data={"train": rows, "weights": weights})).plan()
    assert count_visits(plan) == {"distinct_examples": 4, "visits_per_epoch": visits}


def test_an_unknown_collector_is_refused_before_there_is_a_run(small_config: Config) -> None:
    config = small_config(lens={"collectors": ["adapter_weigths"]})
    with pytest.raises(ConfigurationError, match="Did you mean 'adapter_weights'"):
        TrainingWrapper(config).train()
    assert not list(Path(config.output.base_output_dir).glob("experiments/*"))
