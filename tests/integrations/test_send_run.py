"""What is measured of a run after its training reaches its trackers: each evaluation once, later by sync."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training_lens.config.run_config import read_run_config, remember_consent
from training_lens.integrations.send_run import (
    benchmark_scalars,
    read_delivery_states,
    record_evaluation,
    send_evaluations,
    send_run,
)
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

REPORT: dict[str, Any] = {
    "base": {"loss": 3.0, "perplexity": float("inf")},
    "adapter": {"loss": 2.0, "exact_match": 0.5},
    "delta": {"loss": -1.0},
    "endings": {"adapter": {"answers": 4, "unended": 1, "looping": 0, "room": 40}},
    "verdict": {"sentence": "Better than its base by loss."},
}
OWN = """
from pathlib import Path
from training_lens.integrations import Tracker

class Notes(Tracker):
    name = "notes"
    def require(self): pass
    def open(self): pass
    def end(self): pass
    def log(self, records):
        with open("notes.txt", "a") as file:
            for record in records:
                if record.kind == "evaluation":
                    file.write(f"{record.step} {record.verdict} {record.scalars['compare/change/loss']}\\n")
"""


def test_each_evaluation_has_a_step_of_its_own_behind_the_training(
    own_run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    steps = own_run.read_metadata("summary.json")["steps"]
    for _ in range(2):
        record_evaluation(own_run, "compare", REPORT)
    lines = read_metrics(own_run.evaluations_file)
    assert [line["step"] for line in lines] == [steps, steps + 1]
    assert not caplog.records  # the first evaluation misses no journal
    assert lines[0]["scalars"] == {
        "base/loss": 3.0,
        "adapter/loss": 2.0,
        "adapter/exact_match": 0.5,
        "change/loss": -1.0,
        "adapter/answers_unended": 1.0,
        "adapter/answers_looping": 0.0,
    }


def test_the_speeds_of_a_benchmark_are_numbers_of_each_cell() -> None:
    speed = {name: {"p50": 0.5} for name in ("first_token", "token", "latency")} | {"tokens_per_second": 32.0}
    cells = [
        {"model": "adapter", "batch_size": 4, "prompt_length": 32, "speed": speed},
        {"model": "merged", "batch_size": 4, "prompt_length": 32, "speed": None},
    ]
    found = benchmark_scalars({"cells": cells})
    assert found["adapter/4x32/tokens_per_second"] == 32.0 and found["adapter/4x32/latency_seconds"] == 0.5
    assert not any(name.startswith("merged") for name in found)


def test_a_comparison_is_in_tensorboard_at_once_and_in_an_own_tracker_by_sync(
    own_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "evaluation_notes.py").write_text(OWN)
    config = own_run.read_metadata("config.json")
    config["tracking"]["custom"] = {"evaluation_notes.Notes": {}}
    own_run.write_metadata("config.json", config)
    record_evaluation(own_run, "compare", REPORT)
    assert [(state.name, state.status) for state in send_evaluations(own_run)] == [("tensorboard", "delivered")]
    assert "evaluation_notes" not in sys.modules  # code that a run's folder names is not imported by compare
    shown = EventAccumulator(str(own_run.logs)).Reload()
    assert [event.value for event in shown.Scalars("compare/change/loss")] == [-1.0]
    assert "compare/verdict" in shown.Tags()["tensors"]
    remember_consent(own_run.root, read_run_config(own_run))
    assert all(state.status == "delivered" for state in send_run(own_run))
    record_evaluation(own_run, "compare", REPORT)
    assert {state.name: state.outstanding for state in read_delivery_states(own_run)}[
        "notes"
    ] == "1 lines of its journals"
    send_run(own_run)
    steps = own_run.read_metadata("summary.json")["steps"]
    lines = (tmp_path / "notes.txt").read_text().splitlines()
    assert lines == [f"{step} Better than its base by loss. -1.0" for step in (steps, steps + 1)]
    sys.modules.pop("evaluation_notes", None)
