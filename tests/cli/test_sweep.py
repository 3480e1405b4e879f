"""The sweep command: what it finds as JSON, what it shows, and how it exits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from training_lens.config.compose import compose
from training_lens.sweeps.runner import Sweep, sweep_folder
from training_lens.sweeps.worker import Worker

ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(32)]
SPACE = "sweep.space.training.lr={low: 1e-4, high: 1e-2, log: true}"
TRIALS = [SPACE, "training.epochs=1", "training.max_steps=2", "tracking.tensorboard=false"]
Call = Callable[..., Result]


@pytest.fixture
def settings(write_rows: Callable[..., Path], tmp_path: Path) -> list[str]:
    train, held_out = write_rows(ROWS[:24], "train.jsonl"), write_rows(ROWS[24:], "held_out.jsonl")
    folder = f"output.base_output_dir={tmp_path / 'outputs'}"
    return [f"data.train={train}", f"data.validation={held_out}", folder, "sweep.trials=1", *TRIALS]


@pytest.mark.slow
def test_json_says_what_was_found_and_where(call: Call, settings: list[str]) -> None:
    result = call("sweep", *settings, "--json")
    assert result.stderr.count("embedded demo model") == 1  # of the rehearsal, and not of each trial again
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["study"] == "sweep" and found["finished"] == 1 and found["importances"] == {}
    assert set(found["best"]) == {"trial", "value", "params", "run_dir", "host"}
    assert all(Path(file).is_file() for file in found["files"].values())
    done = call("sweep", *settings)
    assert "trial 0:" not in done.stdout and "best.yaml" in done.stdout  # nothing left to run


def test_where_others_run_all_that_is_left_there_is_nothing_wrong(call: Call, settings: list[str]) -> None:
    config = compose(overrides=[*settings, 'sweep.name="[b]"'])
    theirs = Sweep(config)
    with Worker(sweep_folder(config) / "workers") as worker:
        assert theirs.study.claim_trial(worker) is not None
        result = call("sweep", *settings, 'sweep.name="[b]"', "--json")
    theirs.study.close()
    found = json.loads(result.stdout)
    assert (result.exit_code, found["running"], found["best"]) == (0, 1, None)
    assert "sweep [b], best first" in result.stderr  # a name is no markup


def test_a_space_that_is_wrong_is_one_clear_error(call: Call) -> None:
    assert "nothing to search" in call("sweep").stderr
    result = call("sweep", "sweep.space.peft.r=[0]")
    assert result.exit_code == 2 and "sweep.space.peft.r: given 0" in result.stderr
