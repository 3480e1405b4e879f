"""What is written says what was measured: JSON, Markdown and a CSV line for each row."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.evaluation.reports import render_markdown, render_row_csv, write_reports
from training_lens.evaluation.run_evaluation import EvaluationResult, ModelEvaluator
from training_lens.evaluation.verdict import format_measure
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import open_run
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import read_sealed


@pytest.fixture(scope="module")
def result(finished_run: RunFolder) -> EvaluationResult:
    session = open_run(finished_run)
    settings = EvaluationSection(max_new_tokens=16, resamples=50, length_buckets=[45])
    return ModelEvaluator(session, settings).compare(validation_examples(finished_run, session, 9))


def test_the_csv_has_a_line_for_each_row_and_adds_up(result: EvaluationResult) -> None:
    rows = list(csv.DictReader(io.StringIO(render_row_csv(result))))
    assert [row["id"] for row in rows] == [e.id for e in result.rows.examples]
    assert [row["adapter_answer"] for row in rows] == list(result.outcomes["adapter"].answers)
    loss = sum(float(row["base_loss"]) * int(row["supervised_tokens"]) for row in rows)
    tokens = sum(int(row["supervised_tokens"]) for row in rows)
    assert loss / tokens == pytest.approx(result.comparison.whole.models["base"]["loss"], rel=1e-5)


def test_markdown_tables_have_equally_many_cells_in_every_line(result: EvaluationResult) -> None:
    blocks = [block for block in render_markdown(result).split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 4
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_two_runs_have_their_names_in_every_table(result: EvaluationResult) -> None:
    named = replace(result.comparison, labels={"base": "run-1", "adapter": "run-2"})
    blocks = render_markdown(replace(result, comparison=named)).split("\n\n")
    heads = [block.splitlines()[0] for block in blocks if block.startswith("|")]
    assert not re.search(r"\b(base|adapter)\b", "".join(heads)) and "| row | run-1 | run-2 | change |" in heads


def test_all_three_files_are_written(result: EvaluationResult, tmp_path: Path) -> None:
    report = write_reports(result, tmp_path, "compare", {"run": "r"})
    assert read_sealed(tmp_path / "compare.json") == json.loads(json.dumps(report))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.csv", "compare.json", "compare.md"]


@pytest.mark.parametrize(
    ("measure", "value", "sign", "text"),
    [
        ("exact_match", 0.915, "", "91.5%"),
        ("exact_match", -0.02, "+", "-2.0%"),
        ("loss", 2.94114, "", "2.9411"),
        ("loss", 0.5, "+", "+0.5000"),
        ("perplexity", 19018.3, "", "1.902e+04"),
    ],
)
def test_numbers_are_written_as_people_read_them(measure: str, value: float, sign: str, text: str) -> None:
    assert format_measure(measure, value, sign) == text
