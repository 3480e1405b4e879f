"""The commands knob, rank and lr: what they write, choose and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Call = Callable[..., Result]
FEW = ("evaluation.max_examples=8", "evaluation.resamples=100")


@pytest.fixture
def run(embedded_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_run.root, tmp_path / "runs" / embedded_run.run_id))


def test_knob_measures_offers_and_chooses_only_when_told(call: Call, run: Path, write_rows: Any) -> None:
    general = write_rows([{"text": f"The cat {i} sat on the mat."} for i in range(8)], "general.jsonl")
    words = [str(run), "--scales", "0.9", "--general", str(general), *FEW]
    found = json.loads(call("knob", *words, "--json").stdout)
    assert [point["name"] for point in found["points"]] == ["0", "0.9", "1"] and found["chosen"] == 1
    assert found["general_source"] == str(general) and found["general_rows"] == 8
    assert all((run / "reports" / f"knob.{ending}").is_file() for ending in ("json", "md", "csv", "html"))
    assert not (run / "artifacts/scaled").exists()
    chosen = json.loads(call("knob", str(run), "--choose", "0.9", "--json").stdout)
    assert chosen == {"run": str(run), "chosen": 0.9}
    assert "multiplied by 0.9" in call("evaluate", "--run", str(run), *FEW, "evaluation.generate=false").stdout
    assert json.loads(call("knob", str(run), "--choose", "1", "--json").stdout)["chosen"] == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--choose", "much"], "give a number such as 0.8, or 'offered'"),
        (["--choose", "0"], "give a number above 0"),
        (["--scales", "0,x"], "give numbers with commas between them"),
        (["--scales", "0.5,20"], "is not from 0 to 10"),
        (["training.lr=1"], "knob measures with the run's own config"),
    ],
)
def test_what_knob_cannot_use_is_refused(call: Call, run: Path, words: list[str], problem: str) -> None:
    result = call("knob", str(run), *words)
    assert result.exit_code == 2 and problem in result.stderr


def test_rank_writes_a_smaller_adapter_that_answers(call: Call, run: Path) -> None:
    words = [str(run), *FEW[:1], "--write", "small", "--keep", "4", "--json"]
    found = json.loads(call("rank", *words).stdout)
    assert found["written"]["keep"] == "4" and found["written"]["parameters"] < found["parameters"]
    assert call("infer", "Where?", "--run", "small").exit_code == 0
    refused = call("rank", str(run), *FEW[:1], "--write", "other", "--keep", "3")
    assert refused.exit_code == 2 and "was not measured; give one of 90%, 95%, 99%, 1, 2, 4, 8" in refused.stderr
    assert not Path("other").exists()


@pytest.mark.slow
def test_lr_writes_a_report_and_a_line_to_copy(call: Call, few_rows: dict[str, list[str]]) -> None:
    data = [f"data.train={few_rows['train'][0]}", "data.max_examples=24", "lens.enabled=false"]
    result = call("lr", *data, "--steps", "5", "--rates", "3e-4,1e-3,3e-3", "--seeds", "1", "--json")
    found = json.loads(result.stdout)
    assert "10% of the training rows are held out" in result.stderr
    assert ("training.lr=" in result.stderr) or ("--rates" in result.stderr)
    page = Path(found["report"])
    assert page.read_text().count("<svg") == 2
    assert all(page.with_suffix(ending).is_file() for ending in (".json", ".md", ".csv"))
    assert call("lr", "--rates", "x").exit_code == 2
