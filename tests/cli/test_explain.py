"""The commands of explain: what they write, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from slow_cases import mark_slow
from tiny_models import save_tiny_model

from training_lens import TrainingWrapper
from training_lens.analysis.page.explanations import describe_explanations
from training_lens.runs.run_folder import RunFolder, runs_folder

Call = Callable[..., Result]
FEW = ("evaluation.max_examples=4", "evaluation.resamples=50")


@pytest.fixture
def run(finished_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.root, tmp_path / "runs" / finished_run.run_id))


def test_modules_writes_its_reports_and_the_adapter_without_some(call: Call, embedded_run: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(embedded_run.root, tmp_path / "runs" / embedded_run.run_id))
    result = call("explain", "modules", str(run), *FEW, "--drop", "9", "--write", "small", "--json")
    found = json.loads(result.stdout)
    assert found["residual"] <= 0.01 and "forward and backward passes" in result.stderr
    assert len(found["written"]["dropped"]) == 9
    assert all((run / "reports" / f"explain-modules.{ending}").is_file() for ending in ("json", "md", "csv", "html"))
    (shown,) = [one for one in describe_explanations(RunFolder(run)) if one["page"]]
    assert "The adapter changes the loss from" in shown["sentences"][0]
    (grid,) = shown["parts"]
    assert sum(value or 0 for row in grid["values"] for value in row) == pytest.approx(100, abs=2)
    (run / "reports/explain-modules.json").write_text("{broken")
    (shown,) = [one for one in describe_explanations(RunFolder(run)) if one["page"]]
    assert shown["page"] == "reports/explain-modules.html" and not shown["sentences"] and not shown["parts"]
    assert call("infer", "Where?", "--run", "small").exit_code == 0
    named = call("explain", "modules", str(run), *FEW, "--drop", "q_proj,model.layers.0", "--write", "named", "--json")
    assert {name.rsplit(".", 1)[-1] for name in json.loads(named.stdout)["written"]["dropped"]} > {"q_proj"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--drop", "q_proj"], "--drop and --write go together"),
        (["--drop", "q_prj", "--write", "x"], "--drop q_prj: no adapted module is called so. Did you mean 'q_proj'"),
        mark_slow((["--drop", "3", "--write", "x"], "--drop 3: was not measured; give one of")),
        (["training.lr=1"], "explain measures with the run's own config"),
    ],
)
def test_what_modules_cannot_use_is_refused(call: Call, run: Path, words: list[str], problem: str) -> None:
    result = call("explain", "modules", str(run), *FEW, *words)
    assert result.exit_code == 2 and problem in result.stderr.replace("\n", " ")
    assert not Path("x").exists()


def test_the_group_lists_its_commands_and_knows_no_other(call: Call) -> None:
    assert "modules" in call("explain", "--help").stdout
    assert call("explain", "nothing").exit_code == 2


def test_answer_writes_its_reports(call: Call, run: Path) -> None:
    words = ["explain", "answer", str(run), "Where = here?", "--token", "1", "inference.max_new_tokens=4", "--json"]
    result = call(*words)
    found = json.loads(result.stdout)
    assert found["prompt"] == "Where = here?" and found["token"] == 0 and "6 forward passes" in result.stderr
    assert all((run / "reports" / f"explain-answer.{ending}").is_file() for ending in ("json", "md", "csv", "html"))
    (shown,) = [one for one in describe_explanations(RunFolder(run)) if one["page"]]
    answers, tokens = shown["parts"]
    assert [name for name, _ in answers["answers"]][:2] == ["Prompt", "Base"] and len(shown["sentences"]) >= 2
    assert [text for text, _ in tokens["tokens"]] == [token["text"] for token in found["tokens"]]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give a prompt after the run, or --row ID"),
        (["A prompt", "--row", "x:1"], "the prompt 'A prompt' and --row given"),
        (["--row", "x:1"], "there is no such row"),
        (["A prompt", "--token", "0"], "count from 1"),
        (["A prompt", "training.lr=1"], "explain answers with the run's own config"),
    ],
)
def test_what_answer_cannot_use_is_refused(call: Call, run: Path, words: list[str], problem: str) -> None:
    result = call("explain", "answer", str(run), *words)
    assert result.exit_code == 2 and problem in result.stderr.replace("\n", " ")


def test_a_run_that_was_given_a_name_is_no_prompt(call: Call) -> None:
    RunFolder(runs_folder("outputs", "default") / "mine").create()
    result = call("explain", "answer", "mine")
    assert result.exit_code == 2 and "explain answer mine: give a prompt after the run" in result.stderr


@pytest.mark.parametrize("what", ["rows", "memory"])
def test_an_adapter_without_its_run_is_refused_for_that(call: Call, run: Path, what: str) -> None:
    result = call("explain", what, str(shutil.copytree(RunFolder(run).adapter, "adapter")), "model.id=x")
    assert result.exit_code == 2 and f"explain {what}" in result.stderr and "It takes" not in result.stderr


@pytest.mark.slow
def test_the_rows_of_an_answer_join_its_report(call: Call, small_config: Callable[..., Any], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", vocab_size=1024)
    config = small_config(model={"id": str(model)}, data={"max_examples": 24}, lens={"keep_states": 2})
    run = Path(TrainingWrapper(config).train().run_dir)
    result = call("explain", "answer", str(run), "Where is the key?", "--rows", "inference.max_new_tokens=4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["rows"]
    assert len(found["ranking"]) == 10
    assert found["verification"] is None and "forward and backward passes over" in result.stderr
    page = (run / "reports/explain-answer.html").read_text()
    assert "Which training rows made it" in page and "Not measured: this is a ranking" in page
    refused = call("explain", "answer", str(run), "Where is the key?", "--lds", "3")
    assert refused.exit_code == 2 and "at least 16 random subsets" in refused.stderr.replace("\n", " ")


@pytest.mark.slow
def test_modules_of_an_adapter_without_a_run(call: Call, embedded_run: Any, few_rows: dict[str, list[str]]) -> None:
    """Any PEFT folder, where base and rows are given; without rows it says what is missing."""
    shutil.copytree(embedded_run.adapter, "foreign")
    words = ["explain", "modules", "foreign", *FEW]
    result = call(*words, f"data.validation={few_rows['validation'][0]}", "--json")
    found = json.loads(result.stdout)
    assert found["run"] == "foreign" and found["residual"] <= 0.01
    assert list(Path("outputs/experiments/default/explanations").rglob("explain-modules.html"))
    refused = call(*words, "data.train=nowhere.jsonl")
    assert refused.exit_code == 1 and "nowhere.jsonl" in refused.stderr
    without_base = call(*words, "model.id=no/where", f"data.validation={few_rows['validation'][0]}")
    assert without_base.exit_code != 0 and "no/where" in without_base.stderr


@pytest.mark.slow
def test_an_answer_of_an_adapter_without_a_run_and_what_is_refused_there(call: Call, embedded_run: Any) -> None:
    shutil.copytree(embedded_run.adapter, "foreign")
    words = ["explain", "answer", "foreign", "Where = here?", "inference.max_new_tokens=4"]
    found = json.loads(call(*words, "--json").stdout)
    assert found["run"] == "foreign" and found["tokens"] and found["rows"] is None
    assert list(Path("outputs/experiments/default/explanations").rglob("explain-answer.html"))
    for others in ([*words, "--rows"], ["explain", "rows", "foreign"], ["explain", "memory", "foreign"]):
        refused = call(*others)
        said = " ".join(refused.stderr.split())
        assert refused.exit_code == 2 and "foreign is an adapter without its run" in said and "model.id=BASE" in said
