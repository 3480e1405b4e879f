"""explain rows and explain memory: what they write, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from training_lens.analysis.page.explanations import describe_explanations
from training_lens.data.row_list import read_row_list
from training_lens.runs.run_folder import RunFolder

Call = Callable[..., Result]


@pytest.fixture
def run(finished_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.root, tmp_path / "runs" / finished_run.run_id))


def test_rows_writes_its_reports_and_the_suspects(call: Call, run: Path) -> None:
    found = json.loads(call("explain", "rows", str(run), "--base", "--json").stdout)
    assert found["rows"] == 64 and found["most_visits"] == 1 and found["base_loss"] > found["adapter_loss"]
    assert found["held_out_validations"] > 1
    assert all((run / "reports" / f"explain-rows.{ending}").is_file() for ending in ("json", "md", "csv", "html"))
    (shown,) = [one for one in describe_explanations(RunFolder(run)) if one["page"]]
    assert "64 training rows" in shown["sentences"][0]
    assert shown["parts"][0]["rows"] == [(name, str(len(rows))) for name, rows in found["lists"].items()]
    suspects = run / "reports" / "explain-rows-suspects.txt"
    listed = {row["id"] for row in found["lists"]["likely mislabelled"]}
    assert suspects.is_file() == bool(listed)
    if listed:
        assert {f"{source}:{number}" for source, number in read_row_list(suspects).lines} == listed


def test_memory_writes_its_reports(call: Call, run: Path) -> None:
    result = call("explain", "memory", str(run), "--samples", "4", "--json")
    found = json.loads(result.stdout)
    assert {row["group"] for row in found["continuations"]} == {"training rows", "unseen rows"}
    assert "no proof of privacy" in result.stderr and "planted no canaries" in " ".join(result.stderr.split())
    assert all((run / "reports" / f"explain-memory.{ending}").is_file() for ending in ("json", "md", "csv", "html"))
    (shown,) = [one for one in describe_explanations(RunFolder(run)) if one["page"]]
    assert shown["sentences"][-1].startswith("A low number is no proof") and len(shown["parts"][0]["rows"]) == 6


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["rows", "--learned", "1.5"], "--learned 1.5: give a probability"),
        (
            ["rows", "training.lr=1"],
            "It takes output.*, model.device, model.accept_changed_base, model.trust_remote_code.",
        ),
        (["rows", "--retrain", "--exclude", "lost.txt"], "error: --exclude: 'lost.txt' is not there."),
        (["memory", "--row", "lost.jsonl:1"], "'lost.jsonl:1' is none of the 64 rows"),
        (["memory", "--candidates", "3"], "--candidates 3: give 16"),
    ],
)
def test_what_they_cannot_use_is_refused(call: Call, run: Path, words: list[str], problem: str) -> None:
    result = call("explain", words[0], str(run), *words[1:])
    assert result.exit_code in (1, 2) and problem in " ".join(result.stderr.split())
