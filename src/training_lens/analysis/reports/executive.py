"""One screen in plain words: did it learn, is the capture sound, which layers changed, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training_lens.analysis.reports.facts import (
    captured,
    certificate_of,
    changed_sentence,
    cost_sentence,
    losses,
    missing,
)
from training_lens.analysis.reports.report import Report
from training_lens.utils.pages import Bullets, Callout

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import Analysis
    from training_lens.analysis.findings.finding import Finding
    from training_lens.utils.pages import Part

WRONG = ("problem", "warning")


def executive(analysis: Analysis) -> Report:
    """The executive report of a run."""
    recording, wrong = analysis.recording, [f for f in analysis.findings if f.severity in WRONG]
    unknown = [f for f in analysis.findings if f.confidence == "could not tell"]
    parts: list[Part] = [
        verdict(analysis.findings),
        *("# Did it learn?", losses(recording).sentence()),
        *("# Is the capture sound?", f"{certificate_of(recording).sentence()} {cost_sentence(recording)}"),
        *("# Which layers changed?", changed_sentence(recording)),
        "# What is wrong?",
        Bullets([in_short(f) for f in wrong]) if wrong else "Nothing wrong was found.",
        *(
            [f"{len(unknown)} of {len(analysis.findings)} questions could not be answered: {_titles(unknown)}."]
            * bool(unknown)
        ),
        "# What to do next",
        Bullets(next_steps(analysis)),
    ]
    return Report("executive", f"Run {recording.name}: in short", tuple(parts), in_numbers(analysis))


def verdict(findings: Sequence[Finding]) -> Callout:
    """The worst finding as a box; where nothing is wrong, that."""
    wrong = [finding for finding in findings if finding.severity in WRONG]
    if not wrong:
        return Callout("fine", f"nothing wrong was found among {len(findings)} questions")
    worst = min(wrong, key=lambda finding: WRONG.index(finding.severity))
    others = len(wrong) - 1
    more = (("further", f"{others} more"),) if others else ()
    return Callout(worst.severity, worst.title, (("where", worst.where or "the whole run"), *more))


def in_short(finding: Finding) -> str:
    """A finding in one line."""
    where = f" ({finding.where})" if finding.where else ""
    return f"{finding.title}{where}: {finding.measured}"


def next_steps(analysis: Analysis) -> list[str]:
    """The actions of findings, the worst first; else what would settle those that could not be told."""
    ordered = sorted(analysis.findings, key=lambda f: ("problem", "warning", "note", "fine").index(f.severity))
    actions = [f"{f.title}: {_sentence(f.action)}" for f in ordered if f.action]
    if not actions:
        actions = [
            f"{f.title}: {_sentence(f.decide)}" for f in ordered if f.confidence == "could not tell" and f.decide
        ]
    return list(dict.fromkeys(actions)) or ["Nothing needs to be done."]


def _sentence(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else f"{words}."


def _titles(findings: Sequence[Finding]) -> str:
    return "; ".join(finding.title for finding in findings)


def in_numbers(analysis: Analysis) -> dict[str, object]:
    """What all reports of a run have in their JSON: the run, what was captured and at what cost, results, findings."""
    recording, proof = analysis.recording, certificate_of(analysis.recording)
    columns = ("table", "data_type", "steps", "last_step", "rows")
    return {
        **analysis.values(),
        "losses": vars(losses(recording)),
        "certificate": {**vars(proof), "sound": proof.sound},
        "captured": [dict(zip(columns, row, strict=True)) for row in captured(recording)],
        "not_captured": missing(recording),
        "cost_seconds": recording.captures.cost(),
        "next": next_steps(analysis),
    }


def three_lines(analysis: Analysis) -> list[str]:
    """What training prints at its end: the capture and its certificate, what the adapter did, the worst finding."""
    recording = analysis.recording
    tables = captured(recording)
    steps = max((steps for _, _, steps, _, _ in tables), default=0)
    what = f"{len(recording.modules)} modules, {len(tables)} tables, up to {steps:,} steps"
    wrong = [finding for finding in analysis.findings if finding.severity in WRONG]
    worst = min(wrong, key=lambda finding: WRONG.index(finding.severity)) if wrong else None
    advice = f" What to do: {_sentence(worst.action)}" if worst and worst.action else ""
    ending = f"{worst.severity}: {_sentence(in_short(worst))}{advice}" if worst else "nothing wrong found"
    return [
        f"captured: {what}. {certificate_of(recording).sentence()} {cost_sentence(recording)}",
        f"adapter: {changed_sentence(recording)}",
        ending,
    ]
