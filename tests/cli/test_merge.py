"""`training-lens merge`: its output and exit codes, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Result]


@pytest.fixture
def run(embedded_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to write into."""
    return RunFolder(Path(shutil.copytree(embedded_run.root, tmp_path / "run")))


@pytest.mark.usefixtures("forked_python")
def test_the_measures_are_printed_and_a_second_merge_is_refused(call: Call, run: RunFolder) -> None:
    result = call("merge", "--run", str(run.root), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["output"] == str(run.merged_model) and report["verified"] is True and report["dtype"] == "bf16"
    assert all(check["ok"] for check in report["checks"]) and 0 < report["distance_share"] < 0.1
    assert (
        "rounding to bf16 moves the logits by 0." in result.stderr and "the merged model (bf16) is in" in result.stderr
    )
    again = call("merge", "--run", str(run.root))
    assert again.exit_code == 2 and "Give --force to replace it" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.template=alpaca"], "merge takes what the run's own config says"),
        (["inference.adapter=other"], "both name an adapter"),
        (["--dtype", "int8"], "Invalid value for '--dtype'"),
    ],
)
def test_wrong_usage_is_refused(call: Call, run: RunFolder, arguments: list[str], said: str) -> None:
    result = call("merge", "--run", str(run.root), *arguments)
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_at_its_place(run: RunFolder) -> None:
    command = [sys.executable, "-m", "training_lens", "merge", "--run", str(run.root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    artifacts, deadline = run.root / "artifacts", time.monotonic() + 120
    while not list(artifacts.glob(".tmp-*/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not run.merged_model.exists() and not (run.reports / "merge.json").exists()
    assert len(list(artifacts.glob(".tmp-*"))) == 1
