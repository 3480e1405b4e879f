"""The courier ends when its run does, however that ends, and never holds it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens import TrainingWrapper
from training_lens.integrations.courier import Courier
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

Couriers = Callable[[int], list[int]]
OWN = """
import time
from pathlib import Path
from training_lens.integrations import Tracker

class Steps(Tracker):
    name = "steps"
    def require(self): pass
    def open(self): pass
    def log(self, records): self._say(*(f"{r.kind} {r.step}" for r in records))
    def end(self): self._say(self.run.status)
    def _say(self, *lines):
        print("more than a pipe holds back " * 1000)
        with open(self.options["file"], "a") as file: file.writelines(f"{line}\\n" for line in lines)

class Hangs(Steps):
    name = "hangs"
    def log(self, records): time.sleep(3600)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with trackers of one's own, importable here and by the courier."""
    (tmp_path / "courier_trackers.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


def wait_until(true: Callable[[], Any], seconds: float = 180.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_killed_training_is_sent_as_far_as_it_came(own: Path, couriers_of: Couriers) -> None:
    told = own / "told"
    arguments = [
        "training.epochs=50", "data.max_examples=48", "data.validation=null", "training.logging_steps=1",
        "tracking.tensorboard=false", "lens.enabled=false", "tracking.send_seconds=0.2", "tracking.samples=0",
        "tracking.histograms_every=null",
        f"tracking.custom={{courier_trackers.Steps: {{file: {told}}}}}", f"output.base_output_dir={own}/outputs",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "training_lens", "train", *arguments]
    training = subprocess.Popen(command, env=environment, cwd=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: told.exists() and len(told.read_text().splitlines()) > 3)
    (courier,) = couriers_of(training.pid)
    assert os.getpgid(courier) != os.getpgid(training.pid), "Ctrl-C would reach it"
    assert os.getsid(courier) == os.getsid(training.pid) and os.getpriority(os.PRIO_PROCESS, courier) == 19
    training.send_signal(signal.SIGKILL)
    training.wait()
    wait_until(lambda: not Path(f"/proc/{courier}").exists())
    (metrics,) = own.glob("outputs/experiments/default/runs/*/logs/metrics.jsonl")
    lines = [f"{line['kind']} {line['step']}" for line in read_metrics(metrics)]
    assert told.read_text().splitlines() == [*lines, "interrupted"]


def test_a_tracker_that_hangs_holds_neither_the_others_nor_the_courier(
    own: Path, own_run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    told = own / "told"
    custom = {"courier_trackers.Hangs": {"file": ""}, "courier_trackers.Steps": {"file": str(told)}}
    config = own_run.read_metadata("config.json")
    config["tracking"] |= {"custom": custom, "tensorboard": False, "send_seconds": 0.1, "wait_seconds": 0.5}
    own_run.write_metadata("config.json", config)
    last = read_metrics(own_run.metrics_file)[-1]
    courier = Courier(own_run, seconds=0.5)
    with caplog.at_level("DEBUG", "training_lens"):
        courier.start()
        wait_until(lambda: told.exists() and f"{last['kind']} {last['step']}\n" in told.read_text())
        courier.finish()  # an hour before the tracker would
    log = " ".join(record.getMessage() for record in caplog.records)
    assert "lines of its journals, its end (no answer within 0.5 s)" in log.split("hangs: not sent: ")[1]
    assert "courier: hangs left" in log and "exit code" not in log, "it has left by itself"


@pytest.mark.slow
def test_one_that_hangs_holds_the_end_no_longer_than_asked(own: Path, small_config: Callable[..., Any]) -> None:
    told = own / "told"
    custom = {"courier_trackers.Hangs": {"file": ""}, "courier_trackers.Steps": {"file": str(told)}}
    config = small_config(tracking={"custom": custom, "wait_seconds": 3.0})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))  # it ends, an hour before the tracker would
    assert run.status == "finished" and told.read_text().splitlines()[-1] == "finished"
    log = (run.logs / "run.log").read_text()
    assert "hangs: not sent: 8 lines of its journals, its end (no answer within 3.0 s)" in log
    assert "steps" not in log.split("hangs: not sent")[1].splitlines()[0]
