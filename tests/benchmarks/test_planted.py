"""The planted suite in small: some kinds of failure are found, and healthy runs raise no alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def suite_on_path() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks/planted"))
        yield


def run_one(part: str, name: str, folder: Path, data_set: str = "gsm8k") -> dict[str, Any]:
    """The transcript of one trial, as a line of the suite's file has it."""
    from dataclasses import asdict

    from planted_trial import run_trial  # type: ignore[import-not-found]
    from run_planted import TrialKey, build_case  # type: ignore[import-not-found]

    return json.loads(json.dumps(asdict(run_trial(build_case(TrialKey(part, name, data_set, 0), folder)))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_half_frozen", "leak_exact", "rate_high_100"])
def test_a_planted_failure_is_found(name: str, shared: Path, tmp_path: Path) -> None:
    from planted_suite import KINDS  # type: ignore[import-not-found]
    from verdicts import judge_trial  # type: ignore[import-not-found]

    verdict = judge_trial(KINDS[name], run_one("reported", name, tmp_path))
    assert verdict.outcome in ("before", "during", "after"), verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k, 50 steps", "gsm8k, a loop by hand"])
def test_a_healthy_run_raises_no_alarm(name: str, shared: Path, tmp_path: Path) -> None:
    from planted_suite import CONTROLS
    from verdicts import list_alarms

    assert list_alarms(CONTROLS[name], run_one("controls", name, tmp_path)) == []


def finding(code: str, **values: str) -> dict[str, str]:
    """Plain values of a finding."""
    known = {"stage": "after", "severity": "warning", "confidence": "likely", "title": "", "decide": "", "action": ""}
    return {"code": code, **known, **values}


def transcript(*findings: dict[str, str], messages: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    return {"findings": list(findings), "messages": list(messages), "stopped": None}


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (transcript(), "missed"),
        (transcript(finding("rate_low", severity="fine")), "false fine"),
        (transcript(finding("rate_low")), "after"),
        (transcript(finding("rate_low", stage="during"), finding("rate_low")), "during"),
        (transcript(finding("rate_low", confidence="inconclusive", severity="note", decide="a longer run")), "missed"),
        (transcript(finding("rate_low", confidence="inconclusive", decide="three times the rate")), "inconclusive"),
        (transcript(finding("memorization")), "missed"),
    ],
)
def test_the_outcome_is_that_of_the_right_finding(said: dict[str, Any], outcome: str) -> None:
    from planted_suite import KINDS
    from verdicts import judge_trial

    assert judge_trial(KINDS["rate_low_10"], said).outcome == outcome


def test_a_warning_counts_where_the_kind_expects_it_and_names_other_alarms() -> None:
    from planted_suite import KINDS
    from verdicts import judge_trial

    text = "12 validation examples are training examples too"
    verdict = judge_trial(KINDS["leak_exact"], transcript(finding("rate_high"), messages=(("before", text),)))
    assert (verdict.outcome, verdict.said, verdict.others) == ("before", text, ("rate_high",))
    assert judge_trial(KINDS["duplicates"], transcript(messages=(("before", text),))).outcome == "missed"


def test_a_false_alarm_is_counted_and_a_true_warning_is_not() -> None:
    from planted_case import Control  # type: ignore[import-not-found]
    from verdicts import list_alarms

    control = Control("some", lambda seed, scratch: None, true=("truncated",))
    said = transcript(finding("truncated"), finding("rate_high"), finding("rank", severity="note"))
    assert list_alarms(control, said) == ["rate_high"]


def test_every_kind_has_two_strengths_and_there_are_enough_of_them() -> None:
    from planted_suite import CONTROLS, KINDS

    assert len(KINDS) >= 40 and len(CONTROLS) >= 40


def test_the_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from planted_table import reference  # type: ignore[import-not-found]

    page = (ROOT / "docs/lens/findings.md").read_text(encoding="utf-8")
    assert page == reference(page), "run python tools/planted_table.py"
