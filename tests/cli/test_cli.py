"""The command as a person types it: exit codes, one paragraph an error, one JSON object, nothing half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from forked import fork_command  # type: ignore[import-not-found]
from typer.testing import CliRunner

from training_lens import embedded
from training_lens.cli import cli
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import read_sealed

Call = Callable[..., Result]

ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(24)]
FAST = ["data.max_examples=32", "training.epochs=1", "training.lr=3e-3", "peft.r=4", "tracking.tensorboard=false"]


def name_rows(few_rows: dict[str, list[str]]) -> list[str]:
    return [f"data.{split}={files}" for split, files in few_rows.items()]


@pytest.fixture(scope="module")
def trained(few_rows: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with one finished run on rows of the embedded set, and what `train --json` printed."""
    folder, settings = tmp_path_factory.mktemp("work"), ["data.max_examples=80", "output.experiment_name=default"]
    with contextlib.chdir(folder):
        result = CliRunner().invoke(cli, ["train", "+experiment=quick_test", *name_rows(few_rows), *settings, "--json"])
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.strip().split("\n")
    assert len(lines) == 1
    return folder, json.loads(lines[0])


@pytest.mark.slow
def test_train_json_is_the_summary(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = trained
    assert summary["status"] == "finished" and summary["steps"] == 10
    assert summary["validation_loss"] < summary["base_validation_loss"]
    saved = RunFolder(folder / summary["run_dir"]).read_metadata("summary.json")
    verdict = summary["verdict"]
    assert saved == {name: value for name, value in summary.items() if name != "verdict"}
    assert verdict["outcome"] == "better" and verdict["next_command"].startswith("training-lens compare --run ")


@pytest.fixture
def beside(trained: tuple[Path, dict[str, Any]], call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call`, where there is a finished run."""
    monkeypatch.chdir(trained[0])
    return call


@pytest.fixture
def beside_run(embedded_run: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call`, for commands that only read, where there is a finished run that others read, too."""
    monkeypatch.chdir(embedded_run.root.parents[4])
    return call


def test_infer_streams_an_answer(beside_run: Call) -> None:
    result = beside_run("infer", "Where does the owl live?", "--base", "--domain", "lake", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["base"] is True and answer["answer"]
    plain = beside_run("infer", "Where does the owl live?", "--base", "--domain", "lake")
    assert answer["answer"] in " ".join(plain.stdout.split())


@pytest.mark.slow
def test_sampling_is_seeded(beside: Call) -> None:
    def sampled(seed: int) -> str:
        settings = ["inference.temperature=2", f"inference.seed={seed}", "inference.max_new_tokens=20"]
        result = beside("infer", "Tell me a story.", *settings, "--json")
        return str(json.loads(result.stdout)["answer"])

    assert sampled(1) == sampled(1) != sampled(2)


def test_infer_refuses_an_unknown_domain_and_says_which_there_are(beside_run: Call) -> None:
    result = beside_run("infer", "Hi", "--domain", "hil")
    assert result.exit_code == 2
    assert "this run knows forest, hill, lake. Did you mean 'hill'?" in result.stderr
    assert "choose one with --domain" in beside_run("infer", "Hi").stdout


@pytest.mark.slow
def test_compare_prints_scores_samples_and_json(trained: tuple[Path, dict[str, Any]], beside: Call) -> None:
    folder, summary = trained
    result = beside("compare", "evaluation.max_examples=9", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"]["outcome"] == "better" and result.stderr.count(report["verdict"]["sentence"]) == 1
    assert "thin_evidence" in {remark["code"] for remark in report["verdict"]["remarks"]}
    assert report["rows"] == 9 and set(report["by_domain"]) == {"forest", "hill", "lake"}
    assert report["delta"]["loss"] == pytest.approx(report["adapter"]["loss"] - report["base"]["loss"])
    assert set(report["controls"]) == {"wrong_domain", "no_domain", "shuffled_prompts"}
    assert all(c["scores"]["loss"] > 0 and c["rows"] == 9 for c in report["controls"].values())
    assert read_sealed(folder / summary["run_dir"] / "reports/compare.json") == report
    assert "wrong domain" in result.stderr and "expected" in result.stderr


@pytest.mark.slow
def test_validate_shows_the_plan_and_trains_nothing(call: Call, few_rows: dict[str, list[str]], tmp_path: Path) -> None:
    result = call("validate", "+experiment=quick_test", *name_rows(few_rows), "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["train_examples"], plan["global_batch_size"], plan["total_steps"]) == (160, 8, 20)
    assert plan["config"]["training"]["lr"] == pytest.approx(0.0031)
    assert not (tmp_path / "outputs/experiments").exists()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with good rows and a copy of the embedded model, for tests to break."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shutil.copytree(embedded.PATHS[embedded.MODEL], tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data.train=row.jsonl"], 1, "'row.jsonl' is not there. Did you mean 'rows.jsonl'?"),
        (["peft.r=0", "training.epochs=-1"], 2, "2 problems in the configuration"),
        (["data.train=rows.jsonl", "model.id=model"], 1, "'model' holds no weights; expected model.safetensors"),
        (["--resume", "latest"], 1, "no run in outputs yet"),
    ],
)
def test_errors_are_one_paragraph_and_leave_nothing(
    call: Call, files: Path, arguments: list[str], code: int, message: str
) -> None:
    result = call("train", *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not list((files / "outputs").rglob("run.log"))
    assert not list(files.rglob(".tmp-*"))


def test_debug_shows_the_traceback(files: Path) -> None:
    process = fork_command(files, "train", "data.train=row.jsonl", "--debug")
    process.join()
    errors = (files / "stderr.txt").read_text()
    assert (process.exitcode, "Traceback" in errors) == (1, True), errors


@pytest.mark.parametrize("name", ["compare", "evaluate", "report"])
def test_a_command_alone_says_that_there_is_no_run_yet(call: Call, name: str) -> None:
    result = call(name)
    assert result.exit_code in (1, 2) and result.stderr.startswith("error: "), result.stderr


def test_a_wrong_option_is_wrong_usage(call: Call) -> None:
    assert call("train", "--nonsense").exit_code == 2
    assert call("nonsense").exit_code == 2


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_sets_the_exit_code(
    few_rows: dict[str, list[str]], tmp_path: Path, number: int, code: int
) -> None:
    settings = ["output.run_id=mine", "training.save_steps=2", *FAST, *name_rows(few_rows)]
    settings += ["data.max_examples=240", "training.epochs=9"]
    process = fork_command(tmp_path, "train", *settings)
    run = tmp_path / "outputs/experiments/default/runs/mine"
    while process.is_alive() and not list((run / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    errors = (tmp_path / "stderr.txt").read_text()
    assert process.exitcode == code, errors
    assert "it is saved" in errors
    assert json.loads((run / "metadata/summary.json").read_text())["status"] == "interrupted"


def test_help_needs_neither_torch_nor_the_config() -> None:
    heavy = ("torch", "pydantic", "hydra", "transformers")
    code = f"import sys, training_lens.cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert result.stdout.strip() == "[]"
