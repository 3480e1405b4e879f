"""`training-lens experiment`: what it shows fits a terminal, what it deletes was asked for, and a dead run is told."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from forked import fork_command, redirect_to_files  # type: ignore[import-not-found]
from rich.console import Console

from training_lens.cli.run_tables import show_runs
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.runs.run_listing import read_runs
from training_lens.utils.files import write_json

Call = Callable[..., Result]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, RunFolder]:
    """Three runs of two experiments in the default output folder: one finished, one failed, one broken."""
    made = {}
    places = [("20260101T000000Z-aaaa", "default"), ("20260102T000000Z-bbbb", "default"), ("bad", "another_experiment")]
    for number, (run_id, experiment) in enumerate(places):
        run = RunFolder(runs_folder(str(tmp_path / "outputs"), experiment) / run_id).create()
        status = "failed" if number else "finished"
        summary = {"status": status, "steps": 1000 + number, "validation_loss": 2.0 - number, "seconds": 10.5}
        write_json(run.metadata / "summary.json", summary)
        write_json(run.metadata / "config.json", {"peft": {"r": 4 * (number + 1)}, "output": {"run_id": run_id}})
        made[run_id[-4:]] = run
    (made["bad"].metadata / "config.json").unlink()
    return made


def result_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def test_the_list_is_a_line_a_run_for_a_program_and_says_what_is_broken(call: Call, runs: dict[str, RunFolder]) -> None:
    call("experiment", "tag", runs["aaaa"].run_id, "a-good-start", "keep")
    config = {"model": {"id": "./models/my-base"}, "data": {"train": ["rows/a.jsonl", "b"]}, "training": {"lr": 3e-4}}
    write_json(runs["bbbb"].metadata / "config.json", config)
    result = call("experiment", "list", "--sort", "validation_loss")
    assert result.exit_code == 0, result.stderr
    table, notes = result.stdout.split("bad: ")
    assert table.index("bbbb") < table.index("aaaa") < table.index("bad")
    (line,) = [line for line in table.splitlines() if runs["bbbb"].run_id in line]
    assert line.split() == f"{runs['bbbb'].run_id} default failed 1,001 1.0000 my-base a.jsonl +1 0.0003".split()
    assert "another_experiment" in table and "a-good-start, keep" in table
    assert not any(line.endswith(" ") or "\x1b" in line for line in table.splitlines())
    assert "config.json is missing" in notes


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_no_width_breaks_an_id(runs: dict[str, RunFolder], width: int) -> None:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    show_runs(console, read_runs(str(runs["bad"].root.parents[3])), "validation_loss")
    lines = output.getvalue().splitlines()
    assert all(any(run.run_id in line for line in lines) for run in runs.values())
    assert max(map(len, lines)) <= max(width, len(lines[-1]))


def test_the_list_is_narrowed(call: Call, runs: dict[str, RunFolder]) -> None:
    def listed(*options: str) -> list[str]:
        return [run["run"] for run in result_of(call("experiment", "list", "--json", *options))["runs"]]

    a, b = runs["aaaa"].run_id, runs["bbbb"].run_id
    call("experiment", "tag", a, "keep")
    assert listed("--name", "default") == [b, a]
    assert listed("--status", "broken") == ["bad"]
    assert listed("--tag", "keep") == [a]
    assert listed("output.base_output_dir=elsewhere") == []
    assert "no such runs in elsewhere" in call("experiment", "list", "output.base_output_dir=elsewhere").stdout


def test_show_tells_a_real_run(call: Call, finished_run: RunFolder) -> None:
    result = call("experiment", "show", str(finished_run.root))
    assert result.exit_code == 0, result.stderr
    for said in ("finished", "max_examples", "64", "validation.jsonl", "training loss, steps 1 to", "0 (base)", "█"):
        assert said in result.stdout, said
    told = result_of(call("experiment", "show", str(finished_run.root), "--json"))
    summary = finished_run.read_metadata("summary.json")
    assert told["metrics"]["validation_loss"] == summary["validation_loss"]
    assert [step for step, _ in told["losses"]["step"]] == list(range(1, summary["steps"] + 1))
    assert told["losses"]["base"] == [[0, summary["base_validation_loss"]]]
    assert told["config"]["data.max_examples"] == 64 and "peft.r" not in told["config"]


def test_show_tells_a_broken_run(call: Call, runs: dict[str, RunFolder]) -> None:
    result = call("experiment", "show", "bad")
    assert result.exit_code == 0 and "bad of experiment another_experiment: broken" in result.stdout


def test_compare_shows_metrics_and_the_settings_that_differ(call: Call, runs: dict[str, RunFolder]) -> None:
    a, b = runs["aaaa"].run_id, runs["bbbb"].run_id
    told = result_of(call("experiment", "compare", a, b, "--json"))
    assert told["config"] == {"peft.r": [4, 8]} and [run["run"] for run in told["runs"]] == [a, b]
    shown = call("experiment", "compare", a, b).stdout
    assert "peft.r" in shown and "2.0000" in shown
    assert "takes two runs or more, given 1" in call("experiment", "compare", a).stderr


def test_best_goes_by_the_metric(call: Call, runs: dict[str, RunFolder]) -> None:
    make_finished(runs["bbbb"])
    assert result_of(call("experiment", "best", "--json"))["run"]["run"] == runs["bbbb"].run_id
    told = result_of(call("experiment", "best", "--metric", "validation_loss", "--max", "--json"))
    assert (told["run"]["run"], told["value"]) == (runs["aaaa"].run_id, 2.0)
    assert runs["aaaa"].run_id in call("experiment", "best", "--metric", "steps", "--min").stdout


def test_runs_that_were_validated_on_other_rows_are_told_as_such(call: Call, runs: dict[str, RunFolder]) -> None:
    make_finished(runs["bbbb"])
    told = "these runs were validated on different rows"
    assert told not in call("experiment", "best").stdout
    for name in ("aaaa", "bbbb"):
        write_json(runs[name].metadata / "data.json", {"validation": {"files": {"held.jsonl": name}}})
    for arguments in (["best"], ["list", "--sort", "validation_loss"]):
        assert call("experiment", *arguments).stdout.count(told) == 1, arguments
    assert told not in call("experiment", "list").stdout
    assert result_of(call("experiment", "best", "--json"))["same_validation"] is False


def test_show_leaves_single_domains_to_json_and_odd_lines_out(call: Call, runs: dict[str, RunFolder]) -> None:
    run = runs["aaaa"]
    write_json(run.reports / "compare.json", {"adapter": {"loss": 1.5}, "by_domain": {"law": {"adapter": {"loss": 1}}}})
    run.metrics_file.write_text('{"kind": "step", "step": 1, "loss": 2.5}\n{"kind": "step", "step": 2, "loss": NaN}\n')
    shown = call("experiment", "show", run.run_id)
    assert shown.exit_code == 0, shown.stderr
    assert "adapter.loss" in shown.stdout and "by_domain" not in shown.stdout and "steps 1 to 1" in shown.stdout
    told = result_of(call("experiment", "show", run.run_id, "--json"))
    assert told["metrics"]["by_domain.law.adapter.loss"] == 1 and told["losses"]["step"] == [[1, 2.5]]


def make_finished(run: RunFolder) -> None:
    write_json(run.metadata / "summary.json", {**run.read_metadata("summary.json"), "status": "finished"})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["list", "--sort", "validation_lose"], 2, "Did you mean 'validation_loss'?"),
        (["list", "--name", "defualt"], 2, "Did you mean 'default'?"),
        (["list", "--status", "done"], 2, "'done' is not one of"),
        (["list", "training.lr=1"], 2, "training.lr=1: experiment looks at runs"),
        (["show", "bda"], 1, "Did you mean 'bad'?"),
        (["tag", "bad", "no good"], 2, "tag 'no good'"),
        (["tag", "bad", "keep", "--remove"], 2, "the run bad has no tags"),
        (["delete", "bad"], 2, "there is no terminal to ask on; give --yes"),
        (["delete", "output.base_output_dir=outputs"], 2, "one run or more, given none"),
    ],
)
def test_wrong_usage_says_what_to_do(
    call: Call, runs: dict[str, RunFolder], arguments: list[str], code: int, message: str
) -> None:
    result = call("experiment", *arguments)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (code, True), result.stderr
    assert all(run.root.is_dir() for run in runs.values())


def test_delete_takes_what_is_named_and_nothing_where_one_is_refused(call: Call, runs: dict[str, RunFolder]) -> None:
    a, b = runs["aaaa"], runs["bbbb"]
    write_json(b.metadata / "summary.json", {"status": "running"})
    with b.hold_lock():
        refused = call("experiment", "delete", a.run_id, b.run_id, "--yes")
    assert refused.exit_code == 1 and "is being trained by another process" in refused.stderr and a.root.is_dir()
    told = result_of(call("experiment", "delete", a.run_id, "bad", "--yes", "--json"))
    assert told["deleted"] == [str(run.root.relative_to(Path.cwd())) for run in (a, runs["bad"])] and told["bytes"] > 0
    assert not a.root.exists() and not runs["bad"].root.exists() and b.root.is_dir()


@pytest.mark.parametrize(("answer", "kept"), [(b"n\n", True), (b"y\n", False)])
def test_delete_asks_on_a_terminal(tmp_path: Path, runs: dict[str, RunFolder], answer: bytes, kept: bool) -> None:
    ours, theirs = pty.openpty()
    try:
        asked = ["experiment", "delete", "bad", "--json"]
        process = fork_command(tmp_path, *asked, redirect=lambda: redirect_to_files(theirs))
        os.write(ours, answer)
        process.join(60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.exitcode == 0 and "delete this run for good?" in (tmp_path / "stderr.txt").read_text()
    deleted = json.loads((tmp_path / "stdout.txt").read_text())["deleted"]
    assert len(deleted) == (0 if kept else 1) and runs["bad"].root.is_dir() == kept


@pytest.mark.slow
def test_a_run_trains_once_at_a_time_and_is_told_as_interrupted_when_its_process_is_killed(
    call: Call, tmp_path: Path
) -> None:
    settings = ["output.run_id=mine", "data.max_examples=1000", "training.epochs=3", "peft.r=4"]
    settings += ["tracking.tensorboard=false"]
    run = RunFolder(runs_folder(str(tmp_path / "outputs"), "default") / "mine")
    process = fork_command(tmp_path, "train", *settings)
    while process.is_alive() and not (run.metrics_file.is_file() and run.metrics_file.stat().st_size):
        time.sleep(0.05)
    listed = result_of(call("experiment", "list", "--json"))
    resumed = call("train", "--resume", "latest")
    deleted = call("experiment", "delete", "mine", "--yes")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert listed["runs"][0]["status"] == "running"
    assert resumed.exit_code == 1
    assert f"is being trained by another process (process {process.pid} on host" in " ".join(resumed.stderr.split())
    assert deleted.exit_code == 1 and "the run mine is being trained" in " ".join(deleted.stderr.split())
    (killed,) = result_of(call("experiment", "list", "--json"))["runs"]
    assert killed["status"] == "interrupted" and killed["detail"].startswith(f"died, process {process.pid} on host")
