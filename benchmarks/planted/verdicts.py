"""What became of each trial, and the confusion table of kinds and of findings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planted_case import STAGES, Answer, Control, Kind

Outcome = Literal["before", "during", "after", "inconclusive", "false fine", "missed"]
OUTCOMES: tuple[Outcome, ...] = (*STAGES, "inconclusive", "false fine", "missed")
ALARMS = ("problem", "warning")


@dataclass(frozen=True)
class Verdict:
    """What became of a planted trial; `said` is the finding or message that decided it, `others` other alarms."""

    outcome: Outcome
    said: str
    others: tuple[str, ...]


def judge_trial(kind: Kind, transcript: Mapping[str, Any]) -> Verdict:
    """The outcome of a planted trial: detected at the earliest stage, else inconclusive, denied, or missed."""
    findings = transcript["findings"]
    codes = {answer.code for answer in kind.answers}
    others = tuple(sorted({f["code"] for f in findings if f["severity"] in ALARMS and f["code"] not in codes}))
    for stage in STAGES:
        for said in _find_detections(kind, transcript, stage):
            return Verdict(stage, said, others)
    for answer in kind.answers:
        for finding in findings:
            if _names_test(answer, finding):
                return Verdict("inconclusive", f"{finding['code']}: {finding['decide'] or finding['action']}", others)
    for finding in findings:
        if finding["code"] in kind.deniers and finding["severity"] == "fine":
            return Verdict("false fine", f"{finding['code']}: {finding['title']}", others)
    return Verdict("missed", "", others)


def _find_detections(kind: Kind, transcript: Mapping[str, Any], stage: str) -> Iterable[str]:
    if kind.refusal:
        for when, text in transcript["messages"]:
            if when == stage and re.search(kind.refusal, text):
                yield text
    for finding in transcript["findings"]:
        if finding["stage"] == stage and any(_is_detection(answer, finding) for answer in kind.answers):
            yield f"{finding['code']}: {finding['title']}"


def _is_detection(answer: Answer, finding: Mapping[str, str]) -> bool:
    if finding["code"] != answer.code or finding["confidence"] == "inconclusive":
        return False
    if answer.title:
        return re.search(answer.title, finding["title"]) is not None
    return finding["severity"] != "fine"


def _names_test(answer: Answer, finding: Mapping[str, str]) -> bool:
    if not answer.test or finding["code"] != answer.code or finding["confidence"] != "inconclusive":
        return False
    return re.search(answer.test, f"{finding['decide']} {finding['action']}") is not None


def list_alarms(control: Control, transcript: Mapping[str, Any]) -> list[str]:
    """The codes of false alarms of a control; `stopped` if it did not train."""
    codes = {f["code"] for f in transcript["findings"] if f["severity"] in ALARMS} - set(control.true)
    return sorted(codes | ({"stopped"} if transcript["stopped"] else set()))


def count_kinds(outcomes: Iterable[tuple[str, Outcome]]) -> dict[str, dict[str, int]]:
    """For each kind, how many trials had which outcome."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in outcomes:
        counts[name][outcome] += 1
    return {name: {outcome: of[outcome] for outcome in OUTCOMES} for name, of in counts.items()}


def handled_share(counts: Mapping[str, Mapping[str, int]]) -> float:
    """The share of trials that were detected, or inconclusive with the right test named: the mean over kinds."""
    shares = [sum(of[outcome] for outcome in (*STAGES, "inconclusive")) / sum(of.values()) for of in counts.values()]
    return sum(shares) / max(1, len(shares))
