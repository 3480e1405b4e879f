"""The sweep command: killed and started again twice over it repeats nothing, and JSON says what was found."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result

ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(32)]
TRIALS = ["sweep.space.training.lr={low: 1e-4, high: 1e-2, log: true}", "training.epochs=1", "training.max_steps=2"]
Call = Callable[..., Result]


def settings(write_rows: Callable[..., Path]) -> list[str]:
    train, held_out = write_rows(ROWS[:24], "train.jsonl"), write_rows(ROWS[24:], "held_out.jsonl")
    return [f"data.train={train}", f"data.validation={held_out}", *TRIALS]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "training_lens", "sweep", "--json", *arguments]
    return subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(folder: Path) -> dict[int, float]:
    """Number and loss of the trials that the storage has as finished."""
    database = folder / "outputs/sweeps/sweep/study.db"
    query = (
        "select number, value from trials join trial_values using (trial_id) where state = 'COMPLETE' order by number"
    )
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            rows = connection.execute(query).fetchall()
        connection.close()
    except sqlite3.OperationalError:  # not there yet
        return {}
    return dict(rows)


def started_runs(folder: Path) -> list[Path]:
    return sorted((folder / "outputs/experiments/sweep/runs").iterdir())


def test_killed_and_started_again_by_two_processes_nothing_is_repeated(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    arguments = [*settings(write_rows), "sweep.trials=4"]
    with start(tmp_path, *arguments) as killed:
        while len(finished(tmp_path)) < 2:
            assert killed.poll() is None, killed.stderr
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
    before, summaries = finished(tmp_path), [run / "metadata/summary.json" for run in started_runs(tmp_path)]
    assert 2 <= len(before) < 4
    written = {file: file.stat().st_mtime_ns for file in summaries if '"finished"' in file.read_text()}

    with start(tmp_path, *arguments) as one, start(tmp_path, *arguments) as two:
        ends = [process.communicate(timeout=120) for process in (one, two)]
    lines = [line for _, error in ends for line in error.splitlines() if line.startswith("trial ")]
    assert len(lines) == len({line.split("training.lr=")[1] for line in lines}) == 4 - len(before), ends
    counts = [json.loads(output) for output, _ in ends]
    assert max(count["finished"] for count in counts) == 4
    assert not any(count["failed"] + count["stopped"] for count in counts)
    assert before.items() <= finished(tmp_path).items() and len(finished(tmp_path)) == 4
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert len(started_runs(tmp_path)) == 4


def test_json_says_what_was_found_and_where(call: Call, write_rows: Callable[..., Path]) -> None:
    result = call("sweep", *settings(write_rows), "sweep.trials=1", "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["study"] == "sweep" and found["finished"] == 1 and found["importances"] == {}
    assert set(found["best"]) == {"trial", "value", "params", "run_dir"}
    assert all(Path(file).is_file() for file in found["files"].values())
    done = call("sweep", *settings(write_rows), "sweep.trials=1")
    assert "trial 0:" not in done.stdout and "best.yaml" in done.stdout  # nothing left to run


def test_a_space_that_is_wrong_is_one_clear_error(call: Call) -> None:
    assert "nothing to search" in call("sweep").stderr
    result = call("sweep", "sweep.space.peft.r=[0]")
    assert result.exit_code == 2 and "sweep.space.peft.r: given 0" in result.stderr
