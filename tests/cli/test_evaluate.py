"""evaluate, baseline and compare on runs, bare adapters and bases: what they print, write and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from training_lens.runs.run_folder import RunFolder

FAST = ["evaluation.max_examples=6", "evaluation.max_new_tokens=8", "evaluation.resamples=20"]
ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(8)]
Call = Callable[..., Result]


@pytest.fixture
def run(embedded_run: RunFolder, tmp_path: Path) -> Path:
    """A copy of a finished run, whose reports may be written."""
    shutil.copytree(embedded_run.root, tmp_path / "run")
    return tmp_path / "run"


def printed(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.strip())
    return found


def test_evaluate_judges_the_adapter_alone_and_writes_three_files(call: Call, run: Path) -> None:
    report = printed(call("evaluate", "--run", str(run), *FAST, "--json"))
    assert report["rows"] == 6 and "base" not in report and report["adapter"]["loss"] > 0
    assert report["intervals"]["loss"][0] < report["adapter"]["loss"] < report["intervals"]["loss"][1]
    assert sorted(p.name for p in (run / "reports").glob("evaluation*")) == [
        *("evaluation.csv", "evaluation.json", "evaluation.md")
    ]
    base = printed(call("evaluate", "--run", str(run), "--base", *FAST, "--json"))
    assert base["base"]["loss"] > report["adapter"]["loss"]


@pytest.mark.slow
def test_evaluate_on_rows_of_the_users_choice(call: Call, run: Path, write_rows: Callable[..., Path]) -> None:
    others = write_rows(ROWS, "others.jsonl")
    report = printed(call("evaluate", "--run", str(run), f"data.validation={others}", *FAST, "--json"))
    assert report["rows"] == 6 and report["by_domain"] == {}


def test_a_bare_adapter_is_compared_on_its_base(call: Call, run: Path, write_rows: Callable[..., Path]) -> None:
    rows = write_rows(ROWS, "others.jsonl")
    adapter = run / "artifacts/adapter"
    report = printed(call("compare", "--run", str(adapter), f"data.validation={rows}", *FAST, "--json"))
    assert report["delta"]["loss"] == pytest.approx(report["adapter"]["loss"] - report["base"]["loss"])
    assert len(list(Path("outputs/experiments/default/evaluations").glob("*/compare.json"))) == 1


def test_baseline_is_the_base_on_the_rows_of_a_config(call: Call, write_rows: Callable[..., Path]) -> None:
    rows = write_rows(ROWS)
    report = printed(call("baseline", f"data.train={rows}", "data.val_ratio=0.5", *FAST, "--json"))
    assert report["rows"] == 4 and report["models"] == {"base": "embedded"}


@pytest.mark.slow
def test_compare_with_another_run_shows_the_table(call: Call, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    result = call("compare", "--run", str(run), "--against", str(tmp_path / "other"), *FAST)
    assert result.exit_code == 0, result.stderr
    assert "perplexity" in result.stdout and "by length" in result.stdout and "corrupted" not in result.stdout
    assert len(list((run / "reports").glob("compare-with-*other.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "inference.adapter=none"], "has no adapter to compare"),
        (["evaluate", "inference.temperature=1"], "inference.temperature=1: a run answers with its own config"),
        (["evaluate", "--run", "RUN", "data.template=plain"], "data.template=plain: a run answers with its own config"),
        (
            ["evaluate", "evaluation.controls=false"],
            "evaluation.controls=false: only compare, of an adapter with its base",
        ),
        (
            ["compare", "--run", "RUN", "--against", "RUN", "evaluation.forgetting=x.jsonl"],
            "evaluation.forgetting=x.jsonl",
        ),
        (["compare", "--run", "RUN", "evaluation.forgetting=none.jsonl"], "'none.jsonl' is not there"),
        (["compare", "--run", ""], "--run: given without a value"),
        (["baseline", "training.lr=1e-4"], "baseline evaluates model.id alone"),
        (["baseline", "data.train=rows.jsonl"], "there are no rows to evaluate on; give data.validation"),
        (["evaluate", "--run", "RUN", "evaluation.length_buckets=[64,64]"], "[64, 64] are no bucket limits"),
        (["evaluate", "--run", "RUN", "evaluation.confidence=2"], "evaluation.confidence: given 2"),
        (["compare", "--run", "RUN", "--against", "RUNN"], "no run 'RUNN'"),
    ],
)
def test_wrong_usage_is_told(
    call: Call, run: Path, write_rows: Callable[..., Path], arguments: list[str], message: str
) -> None:
    write_rows(ROWS)
    result = call(*(str(run) if a == "RUN" else a for a in arguments))
    assert result.exit_code in (1, 2) and message in result.stderr, result.stderr
