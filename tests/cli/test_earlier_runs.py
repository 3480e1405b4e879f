"""Runs that an earlier version wrote (tests/earlier/runs.tar.gz, of November 2026) are read, judged and resumed."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Result]
RUNS = Path(__file__).parents[1] / "earlier/runs.tar.gz"


@pytest.fixture
def runs(call: Call, tmp_path: Path) -> Path:
    """The folder of two runs of the same settings: `finished`, and `killed` after step 5 of 6."""
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "outputs/experiments/default/runs"


def losses(run: Path) -> dict[tuple[str, int], float]:
    return {(line["kind"], line["step"]): line["loss"] for line in read_metrics(run / "logs/metrics.jsonl")}


def test_a_killed_run_is_resumed_and_ends_as_the_undisturbed_one(call: Call, runs: Path) -> None:
    result = call("train", "--resume", "killed")
    assert result.exit_code == 0, result.output
    assert "resuming after step 4 of 6" in result.output
    assert losses(runs / "killed") == pytest.approx(losses(runs / "finished"), rel=1e-4)
    assert RunFolder(runs / "killed").status == "finished"


def test_a_killed_run_is_not_resumed_with_other_rows(call: Call, runs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("pears", "plums", 1))
    result = call("train", "--resume", "killed")
    assert result.exit_code == 1 and "is no longer what it was" in result.output


@pytest.mark.usefixtures("forked_python")
@pytest.mark.parametrize("commands", ["four", pytest.param("all", marks=pytest.mark.slow)])
def test_a_finished_run_is_read_by_every_command(call: Call, runs: Path, commands: str) -> None:
    calls = (
        ("analyze", "finished"),
        ("experiment", "show", "finished"),
        ("export", "finished", "--data-type", "adapter_gradients"),
        ("infer", "--run", "finished", "How many pears has 3?", "inference.max_new_tokens=3"),
        ("doctor", "finished"),
        ("report", "finished"),
        ("compare", "--run", "finished", "evaluation.max_new_tokens=4"),
        ("merge", "--run", "finished"),
    )
    for command in calls if commands == "all" else calls[:4]:
        result = call(*command)
        assert result.exit_code == 0, (command, result.output)
        assert "damaged" not in result.output and "missing" not in result.output, command
