"""What a page advises fits the run's verdict, and each of its commands calls the run by a name that finds it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from ui.run_factory import write_run

from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.page.lens_page import describe_findings
from training_lens.analysis.page.next_steps import list_next_steps
from training_lens.evaluation.verdict import Remark, Verdict, next_command
from training_lens.runs.run_lookup import find_run, name_run
from training_lens.ui.app import build_app
from training_lens.ui.guard import Access
from training_lens.ui.web import Outputs

BETTER = Verdict("better", "Better.", "comparison", "loss", -1.0, (-1.1, -0.9), 300)
THIN = Remark("thin_evidence", "note", "Few rows.")


@pytest.mark.parametrize(
    ("verdict", "first", "others"),
    [
        (BETTER, "playground", ["merge it", "serve it", "push it"]),
        (replace(BETTER, remarks=(THIN,)), "compare --run one data.validation=FILE", ["try it in the playground"]),
        (replace(BETTER, outcome="worse"), "#findings", ["train with other settings", "try it in the playground"]),
        (replace(BETTER, outcome="no difference"), "#findings", ["train with other settings"]),
        (replace(BETTER, outcome="inconclusive"), "compare --run one data.validation=FILE", []),
    ],
)
def test_the_first_step_fits_the_verdict(verdict: Verdict, first: str, others: list[str]) -> None:
    step, *more = list_next_steps("one", "finished", replace(verdict, next_command=next_command(verdict, "one")))
    assert first in (step.command.removeprefix("training-lens "), step.place)
    assert [each.name for each in more][: len(others)] == others
    assert (verdict.outcome == "better") or not {"merge it", "push it"} & {each.name for each in more}


def test_an_unfinished_run_is_finished_first_and_one_that_trains_needs_nothing() -> None:
    (step,) = list_next_steps("one", "interrupted", BETTER)
    assert step.command == "training-lens train --resume one"
    assert list_next_steps("one", "running", BETTER) == []


def test_the_name_of_a_run_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id, unless commands look elsewhere or the id means something else, too."""
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "outputs"
    clear, twice, same, elsewhere = (
        write_run(outputs, "default", "one-run"),
        write_run(outputs, "default", "twice"),
        write_run(outputs, "default", "other"),
        write_run(tmp_path / "more", "default", "one-run"),
    )
    write_run(outputs, "other", "twice")
    assert name_run(clear) == "one-run"
    assert [name_run(run) for run in (twice, same, elsewhere)] == [str(run.root) for run in (twice, same, elsewhere)]
    for run in (clear, twice, same, elsewhere):
        assert find_run(name_run(run), "outputs").root.resolve() == run.root


def test_all_commands_of_a_page_call_the_run_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a b", "one")
    client = TestClient(build_app(Outputs(tmp_path), Access(8000)), base_url="http://127.0.0.1:8000")
    page = client.get("/api/runs/a%20b/one").json()
    commands = [step["command"] for step in page["next_steps"]] + [page["headline"]["verdict"]["next_command"]]
    assert page["name"] == shlex.quote(str(run.root)) and all(
        page["name"] in command for command in commands if command
    )


@pytest.mark.parametrize(
    ("advice", "command"),
    [
        ("training-lens analyze RUN --test rank --test-steps 4: too short", "analyze one --test rank --test-steps 4"),
        ("training-lens rank RUN, which measures the loss at smaller ranks", "rank one"),
        ("of text: training-lens compare with data.validation=A, and without", "compare --run one data.validation=A"),
        ("training-lens compare, whose control gives each answer the prompt of another row", "compare --run one"),
        ("training-lens prepare leaves duplicates out; or lower training.epochs", ""),
        ("a lower rate", ""),
    ],
)  # fmt: skip
def test_a_command_in_advice_can_be_copied(advice: str, command: str) -> None:
    finding = Finding("x", "note", "X", "", "", "", "", "", "inconclusive", decide=advice)
    (found,) = describe_findings((finding,), "one")["findings"]
    assert found["command"] == (f"training-lens {command}" if command else "") and " RUN" not in found["decide"]
