"""A process that is lost ends the others at once, and the run goes on from its newest checkpoint."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from lost_runs import assert_same_results, begin, complete, find_run, wait_for_checkpoint  # type: ignore[import-not-found]

from training_lens.runs.run_folder import RunFolder

pytestmark = pytest.mark.distributed
SOON = 30.0  # seconds; torchrun's agent looks for lost processes five times a second, and gives them a while to end


def workers(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, by rank."""
    found = [p for p in psutil.Process(agent.pid).children() if "RANK" in p.environ()]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other_with_one_error_and_the_run_resumes_exactly(
    tmp_path: Path, undisturbed: RunFolder, lost: int
) -> None:
    agent, run = begin(tmp_path, "output.run_id=cut"), find_run(tmp_path, "cut")
    wait_for_checkpoint(run, 5)
    both = workers(agent)
    both[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = agent.communicate()
    assert agent.returncode == 1 and time.monotonic() - killed < SOON
    assert not any(process.is_running() for process in both)
    assert f"process {lost} of 2 was killed (SIGKILL)" in errors and "Traceback" not in errors
    assert len(re.findall(r"^error", errors, re.MULTILINE)) <= 1
    complete(begin(tmp_path, "--resume", "cut"))
    assert_same_results(run, undisturbed)


def test_a_killed_process_is_started_anew_and_the_run_goes_on_by_itself(tmp_path: Path, undisturbed: RunFolder) -> None:
    agent, run = begin(tmp_path, "output.run_id=cut", "distributed.restarts=1"), find_run(tmp_path, "cut")
    wait_for_checkpoint(run, 5)
    workers(agent)[1].send_signal(signal.SIGKILL)
    complete(agent)
    assert "resuming after step" in (run.logs / "run.log").read_text()
    assert_same_results(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_saves_the_run(tmp_path: Path, undisturbed: RunFolder, number: Any) -> None:
    agent, run = begin(tmp_path, "output.run_id=cut"), find_run(tmp_path, "cut")
    wait_for_checkpoint(run, 5)
    agent.send_signal(number)
    _, errors = agent.communicate()
    assert agent.returncode == 128 + number and "Traceback" not in errors
    assert run.status == "interrupted" and "training-lens train --resume" in errors
    complete(begin(tmp_path, "--resume", "cut"))
    assert_same_results(run, undisturbed)
