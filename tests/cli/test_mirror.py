"""Commands on runs of a mirror: listed, read, resumed; what cannot be is one line and an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hub_server import Hub

from training_lens.integrations.mirror import MirrorIntegration
from training_lens.integrations.record import RunRecord
from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Result]


@pytest.fixture
def place(own_run: RunFolder, tmp_path: Path) -> str:
    """A mirror with one finished run."""
    MirrorIntegration(RunRecord(own_run, {"output": {"mirror": str(tmp_path / "mirror")}})).deliver(ended=True)
    return f"file://{tmp_path}/mirror"


def test_the_runs_of_a_mirror_are_listed(call: Call, place: str, finished_run: RunFolder) -> None:
    shown = call("experiment", "list", "--mirror", place, "--sort", "validation_loss")
    assert shown.exit_code == 0 and finished_run.run_id in shown.stdout and "finished" in shown.stdout
    (told,) = json.loads(call("experiment", "list", "--mirror", place, "--json").stdout)["runs"]
    assert told["path"].endswith(f"mirror/experiments/default/runs/{finished_run.run_id}") and told["metrics"]
    assert call("experiment", "list", "--mirror", place, "--status", "failed", "--json").exit_code == 0


@pytest.mark.parametrize("which", ["", "/experiments/default/runs/{}"])
def test_a_run_of_a_mirror_is_read(call: Call, place: str, finished_run: RunFolder, which: str) -> None:
    result = call("export", place + which.format(finished_run.run_id), "--data-type", "loss", "--json")
    assert result.exit_code == 0, result.stderr
    exported = json.loads(result.stdout)["files"]
    copy = f"outputs/cache/runs/default/{finished_run.run_id}/"
    assert exported and all(copy in file for file in exported)


def test_a_finished_run_is_not_resumed(call: Call, place: str, finished_run: RunFolder) -> None:
    result = call("train", "--resume", f"{place}/experiments/default/runs/{finished_run.run_id}")
    assert result.exit_code == 1 and "is finished; there is nothing to resume" in result.stderr
    result = call("train", "--resume", place)
    assert (
        result.exit_code == 1 and "(finished); expected one that is unfinished. No run in the mirror" in result.stderr
    )


def test_an_adapter_of_a_mirror_answers(call: Call, place: str) -> None:
    result = call("infer", "Note who has what.", "--run", place, "inference.max_new_tokens=4", "--json")
    assert result.exit_code == 0, result.stderr
    assert "/cache/runs/default/" in result.stdout + result.stderr


@pytest.mark.slow
def test_a_run_of_a_mirror_is_pushed(call: Call, place: str, hub: Hub) -> None:
    result = call("push", place, "me/tiny", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert "adapter_model.safetensors" in [file["path"] for file in json.loads(result.stdout)["files"]]


def test_a_place_that_cannot_be_opened_is_one_line(call: Call) -> None:
    result = call("experiment", "list", "--mirror", "nowhere://bucket")
    assert result.exit_code == 1 and "the protocol nowhere:// is unknown" in result.stderr
