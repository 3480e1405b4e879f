"""The command combine: its table and JSON, commands that take its run, and what is typed wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Call = Callable[..., Result]
FEW = ("evaluation.max_examples=4", "evaluation.resamples=50")


@pytest.fixture(scope="module")
def three_runs(make_once: Callable[..., Path], small_config_in: Callable[..., Any]) -> list[str]:
    """Three runs elsewhere, for reading alone; the last has another rank."""

    def make(folder: Path) -> None:
        from training_lens import TrainingWrapper

        for run_id, rank in {"one": 4, "two": 4, "other": 6}.items():
            sections = {"peft": {"r": rank}, "output": {"run_id": run_id}, "training": {"max_steps": 2}}
            TrainingWrapper(small_config_in(folder, data={"max_examples": 16}, **sections)).train()

    folder = make_once("to combine", make) / "experiments/default/runs"
    return [str(folder / name) for name in ("one", "two", "other")]


def test_two_runs_become_one_that_other_commands_take(call: Call, three_runs: list[str]) -> None:
    words = [
        *three_runs[:2],
        "--how",
        "ties",
        "--density",
        "0.6",
        "--metric",
        "exact_match",
        "output.run_id=both",
        *FEW,
    ]
    result = call("combine", *words, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["how"] == "ties" and found["density"] == 0.6 and found["weights"] == [1, 1]
    assert [task["name"] for task in found["tasks"]] == ["one", "two"]
    assert (
        set(found["tasks"][0]["losses"]) == set(found["tasks"][0]["answers"]) == {"base", "one", "two", "combination"}
    )
    assert "the task of one" in result.stderr and "loss on 4 rows of one" in result.stderr
    run = found["run"]
    assert (
        run == "outputs/experiments/default/runs/both" and (Path(run) / "artifacts/adapter/combination.json").is_file()
    )
    assert call("infer", "Where?", "--run", run, "inference.max_new_tokens=2").exit_code == 0
    assert call("evaluate", "--run", "both", *FEW, "evaluation.generate=false").exit_code == 0
    listed = json.loads(call("experiment", "list", "--json").stdout)
    assert "both" in [one["run"] for one in listed["runs"]]
    assert call("doctor", run).exit_code == 0
    assert "finished after 0 steps" in call("train", "--resume", run).stderr
    again = call("combine", *three_runs[:2], "output.run_id=both", *FEW)
    assert again.exit_code == 2 and "the run 'both' exists already" in again.stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["ONE"], "two runs or more are combined, given only"),
        (["ONE", "twoo"], "no run 'twoo'"),
        (["ONE", "ONE"], "is given twice"),
        (["ONE", "TWO", "--weights", "1"], "--weights: 1 for 2 adapters"),
        (["ONE", "TWO", "--weights", "1,much"], "give numbers with commas between them"),
        (["ONE", "TWO", "--weights", "1,0"], "0 is no weight"),
        (
            ["ONE", "TWO", "--how", "linear", "--density", "0.5"],
            "--density: --how linear does not use it, only ties, dare",
        ),
        (["ONE", "TWO", "--how", "ties", "--density", "1.5"], "--density 1.5: give a share above 0 and at most 1"),
        (["ONE", "TWO", "--how", "svd", "--rank", "-2"], "--rank -2: give a whole number above 0"),
        (["ONE", "TWO", "--how", "cat", "--rank", "2"], "--rank: --how cat does not use it, only svd, ties, dare"),
        (["ONE", "OTHER", "--how", "linear"], "--how linear adds A to A and B to B"),
        (["ONE", "TWO", "training.lr=1"], "combine takes everything else from the runs"),
        (["ONE", "TWO/artifacts/adapter"], "is an adapter without its run"),
        (["ONE", "TWO", "--how", "average"], "'average' is not one of"),
    ],
)
def test_what_is_typed_wrongly_is_refused(call: Call, three_runs: list[str], words: list[str], problem: str) -> None:
    named = dict(zip(("ONE", "TWO", "OTHER"), three_runs, strict=True))
    for name, folder in named.items():
        words = [word.replace(name, folder) if word.split("/")[0] == name else word for word in words]
    result = call("combine", *words)
    assert result.exit_code in (1, 2) and problem in result.stderr, result.stderr
    assert not Path("outputs").exists()
