"""Rows that a model was trained on are marked, measured apart, and left out of the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens import TrainingWrapper
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.data.examples import Example, Message
from training_lens.data.source_reader import read_examples
from training_lens.evaluation.reports import leak_line, part_table, render_markdown, render_row_csv
from training_lens.evaluation.run_evaluation import EvaluationResult, ModelEvaluator
from training_lens.inference.session import Session, open_run
from training_lens.runs.run_folder import RunFolder

ROWS = [{"question": f"Where is the {name} of farm {i}?", "answer": f"In the hall {i * 7}."}
        for i, name in enumerate(("owl", "fox", "hen", "cat", "dog") * 8)]  # fmt: skip
LOSSES = EvaluationSection(generate=False, resamples=50, controls=False)


@pytest.fixture(scope="module")
def run(small_config_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that held some rows of its file out, and took only some of the others."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"train": str(folder / "rows.jsonl"), "val_ratio": 0.25, "max_examples": 20}
    config = small_config_in(folder / "outputs", data=data, training={"max_steps": 2})
    return RunFolder(Path(TrainingWrapper(config).train().run_dir))


@pytest.fixture(scope="module")
def session(run: RunFolder) -> Session:
    return open_run(run)


def evaluate(session: Session, examples: list[Example]) -> EvaluationResult:
    return ModelEvaluator(session, LOSSES).compare(examples)


@pytest.fixture(scope="module")
def result(run: RunFolder, session: Session) -> EvaluationResult:
    examples = list(read_examples(session.config.data.train, "data.train", session.config.data))
    return evaluate(session, examples)


def test_exactly_the_rows_that_the_run_took_are_marked(run: RunFolder, result: EvaluationResult) -> None:
    trained = result.comparison.trained
    assert trained.leaked is not None and int(trained.leaked.sum()) == 20 and trained.counts["exact"] == 20
    marked = {e.id for e, leaked in zip(result.rows.examples, trained.leaked, strict=True) if leaked}
    assert not marked & set(run.read_metadata("held_out.json"))


def test_numbers_with_and_without_them_stand_side_by_side(result: EvaluationResult) -> None:
    comparison = result.comparison
    new, old = comparison.by_leak["not in training"], comparison.by_leak["in training"]
    assert (new.rows, old.rows, new.leaked, old.leaked, comparison.whole.leaked) == (20, 20, 0, 20, 20)
    total = sum(g.models["adapter"]["loss"] * g.supervised_tokens for g in (new, old))
    assert total / comparison.whole.supervised_tokens == pytest.approx(comparison.whole.models["adapter"]["loss"])
    found = comparison.as_json()
    assert found["leaks"] == {
        "checked": True,
        "rows": 20,
        "of": 40,
        "exact": 20,
        "normalized": 0,
        "question": 0,
        "near": 0,
    }
    assert found["by_leak"]["not in training"]["rows"] == 20 and found["leaked"] == 20


def test_every_table_carries_the_mark(result: EvaluationResult) -> None:
    assert leak_line(result.comparison).startswith("* 20 of 40 rows are training rows, too: 20 equal")
    assert [line[0] for line in part_table(result.comparison, "rows")[1:]] == ["not in training", "in training*"]
    text = render_markdown(result).replace("&#42;", "*")
    assert "| base* | adapter* |" in text and "| in training* |" in text and "\n* 20 of 40 rows" in text
    lines = render_row_csv(result).splitlines()
    assert lines[0].endswith(",in_training") and sum(line.endswith(",1") for line in lines) == 20


def test_the_verdict_is_on_the_other_rows(session: Session, result: EvaluationResult) -> None:
    assert result.verdict is not None and result.verdict.rows == 20
    assert result.verdict.change == pytest.approx(result.comparison.by_leak["not in training"].delta["loss"])
    (remark,) = (remark for remark in result.verdict.remarks if remark.code == "leaks")
    assert remark.severity == "warning" and "The verdict is on the other 20." in remark.sentence
    trained = result.comparison.trained.leaked
    assert trained is not None
    only = evaluate(session, [result.rows.examples[i] for i in np.flatnonzero(trained)])
    assert only.verdict is not None and only.verdict.outcome == "inconclusive"
    assert "data.validation=FILE" in only.verdict.decide


def test_the_same_question_in_another_case_is_marked_and_a_new_one_is_not(
    session: Session, result: EvaluationResult
) -> None:
    trained = result.comparison.trained.leaked
    assert trained is not None
    known = result.rows.examples[int(np.flatnonzero(trained)[0])]
    asked, answer = known.messages
    other = replace(
        known, messages=(replace(asked, text=f"So, {asked.text.lower()}"), Message("assistant", "Nowhere."))
    )
    new = replace(known, messages=(Message("user", "Who sang to the miller?"), answer))
    found = evaluate(session, [other, new]).comparison.trained
    assert found.leaked is not None and found.leaked.tolist() == [True, False] and found.counts["question"] == 1


def test_where_they_cannot_be_read_the_report_says_so(
    session: Session, result: EvaluationResult, tmp_path: Path
) -> None:
    gone = replace(session, config=session.config.replace_keys(data={"train": [str(tmp_path / "gone.jsonl")]}))
    found = evaluate(gone, result.rows.examples[:4]).comparison
    assert found.trained.leaked is None and "gone.jsonl' is not there" in leak_line(found)
    assert found.as_json()["leaks"]["checked"] is False and not found.by_leak
