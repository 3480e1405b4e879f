"""The executive report: one screen on learning, problems, changed layers, capture quality and next steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from training_lens.analysis.checkpoint_analyzer import Analysis
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.reports.report_files import Report
from training_lens.analysis.run_facts import (
    cost_brief,
    cost_sentence,
    find_verdict,
    list_captured,
    list_missing,
    read_certificate,
    read_changes,
    read_losses,
)
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, Callout, Part, SvgPicture, Table
from training_lens.display.svg import Curve, render_chart
from training_lens.evaluation.verdict import ORDER, Verdict

WRONG = ("problem", "warning")
LONGEST_LINE, LONGEST_PLACE = 150, 60  # characters


def build_executive(analysis: Analysis) -> Report:
    """The executive report of a run."""
    recording, wrong = analysis.recording, [f for f in analysis.findings if f.severity in WRONG]
    verdict = find_verdict(recording)
    unknown = [f for f in analysis.findings if f.confidence == "inconclusive"]
    faults = [verdict.sentence] if verdict is not None and verdict.outcome == "worse" else []
    faults += [remark.sentence for remark in (verdict.remarks if verdict else ()) if remark.severity in WRONG]
    faults += [summarize_finding(finding) for finding in wrong]
    parts: list[Part] = [
        build_verdict(analysis.findings, verdict),
        *("# Did it learn?", read_losses(recording).as_sentence(recording.manifest.origin)),
        *("# Next steps", BulletList(next_steps(analysis))),
        "# Problems",
        BulletList(faults) if faults else "No problems were found.",
        *([f"Inconclusive ({len(unknown)} of {len(analysis.findings)} checks):"] * bool(unknown)),
        *([BulletList([summarize_finding(f) for f in unknown])] * bool(unknown)),
        *("# Which layers changed?", read_changes(recording).as_sentence()),
        *("# Is the capture sound?", f"{read_certificate(recording).as_sentence()} {cost_sentence(recording)}"),
    ]
    return Report("executive", f"Run {recording.name}: summary", tuple(parts), collect_values(analysis))


def build_verdict(findings: Sequence[Finding], verdict: Verdict | None) -> Callout:
    """The most severe result as a box: the verdict on the adapter or the worst finding, with the action.

    The box is fine only if the adapter is better than its base and no finding speaks against it.
    """
    worst = find_worst(findings)
    if verdict is not None and (worst is None or ORDER.index(verdict.severity) <= ORDER.index(worst.severity)):
        return _verdict_callout(verdict, worst, findings)
    if worst is None:
        unknown = _count_inconclusive(findings)
        if unknown and all(finding.confidence == "inconclusive" for finding in findings):
            return Callout("note", "too little was captured to decide anything", (("inconclusive", unknown),))
        return Callout("note", "no problems were found", (("inconclusive", unknown),) if unknown else ())
    others = sum(finding.severity in WRONG for finding in findings) - 1
    facts = {
        "where": worst.where or "the whole run",
        "what to do": worst.action or worst.decide,
        "other problems": f"{others} more" if others else "",
        "better than its base?": verdict.sentence if verdict else "",
    }
    return Callout(worst.severity, worst.title, [fact for fact in facts.items() if fact[1]])


def _verdict_callout(verdict: Verdict, worst: Finding | None, findings: Sequence[Finding]) -> Callout:
    """The verdict on the adapter as a box, including the worst finding."""
    found = f"{summarize_finding(worst)} {worst.action or worst.decide}" if worst else "no problems were found"
    facts = {
        "also": "\n".join(remark.sentence for remark in verdict.remarks),
        "what would decide": verdict.decide,
        "next": "" if verdict.next_command.startswith("training-lens report") else verdict.next_command,
        "worst finding": found,
        "inconclusive": _count_inconclusive(findings),
    }
    is_inconclusive = bool(findings) and all(finding.confidence == "inconclusive" for finding in findings)
    severity = "note" if is_inconclusive and verdict.severity == "fine" else verdict.severity
    return Callout(severity, verdict.sentence, [fact for fact in facts.items() if fact[1]])


def _count_inconclusive(findings: Sequence[Finding]) -> str:
    """How many checks are inconclusive; empty if none is."""
    unknown = sum(finding.confidence == "inconclusive" for finding in findings)
    return f"{unknown} of {len(findings)} checks are inconclusive" if unknown else ""


def find_worst(findings: Sequence[Finding]) -> Finding | None:
    """The first of the most severe findings; None if nothing is wrong."""
    wrong = [finding for finding in findings if finding.severity in WRONG]
    return min(wrong, key=lambda finding: WRONG.index(finding.severity)) if wrong else None


def summarize_finding(finding: Finding) -> str:
    """A finding in one line."""
    where = f" ({finding.where})" if finding.where else ""
    return f"{finding.title}{where}: {finding.measured}"


def next_steps(analysis: Analysis) -> list[str]:
    """The actions of findings, most severe first; without any, what would settle the inconclusive ones."""
    ordered = sorted(analysis.findings, key=lambda f: ORDER.index(f.severity))
    actions = [f"{f.title}: {_add_full_stop(f.action)}" for f in ordered if f.action]
    if not actions:
        actions = [
            f"{f.title}: {_add_full_stop(f.decide)}" for f in ordered if f.confidence == "inconclusive" and f.decide
        ]
    return list(dict.fromkeys(actions)) or ["Nothing needs to be done."]


def _add_full_stop(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else f"{words}."


def collect_values(analysis: Analysis) -> dict[str, object]:
    """The JSON content that all reports of a run share: run, captures and their cost, results, findings."""
    recording, proof = analysis.recording, read_certificate(analysis.recording)
    verdict = find_verdict(recording)
    columns = ("table", "data_type", "steps", "last_step", "rows")
    return {
        **analysis.values(),
        "verdict": verdict.as_json() if verdict else None,
        "losses": vars(read_losses(recording)),
        "certificate": {**vars(proof), "sound": proof.is_sound},
        "captured": [dict(zip(columns, row, strict=True)) for row in list_captured(recording)],
        "not_captured": list_missing(recording),
        "cost_seconds": recording.captures.cost(),
        "next": next_steps(analysis),
    }


def three_lines(analysis: Analysis) -> list[str]:
    """What training prints at its end: the capture, its check and cost; what changed; the worst finding, its action."""
    recording = analysis.recording
    counts = ((steps, last) for _, _, steps, last, _ in list_captured(recording))
    steps = max((min(count, last or count) for count, last in counts), default=0)  # step 0 trains nothing
    cost = cost_brief(recording).partition(" time of")[0]
    taken = (
        f"captured: {len(recording.modules)} modules over {steps:,} steps; {read_certificate(recording).as_phrase()}"
    )
    lines = (
        f"{taken}; cost {cost or 'not recorded'}",
        f"changed: {read_changes(recording).as_phrase()}",
        _worst_line(analysis.findings, find_verdict(recording)),
    )
    return [shorten(line, LONGEST_LINE, placeholder=" ...") for line in lines]


def _worst_line(findings: Sequence[Finding], verdict: Verdict | None) -> str:
    worst = find_worst(findings)
    if verdict is not None and verdict.severity == "problem":
        return f"problem: {verdict.sentence}"
    if worst is None:
        caveat = verdict.sentence if verdict is not None and verdict.outcome != "better" else ""
        return "; ".join(filter(None, ("no problems found", _count_inconclusive(findings), caveat)))
    where = f" ({shorten(worst.where, LONGEST_PLACE, placeholder=' ...')})" if worst.where else ""
    return f"{worst.severity}: {worst.title}{where}: {worst.action or worst.decide or worst.measured}"


NAMED = 8  # list items that are printed
MOST_DOTS = 40  # points of a curve that are marked


def build_diagnostic(analysis: Analysis) -> Report:
    """The diagnostic report of a run: problems, warnings and notes in full, fine findings as a table."""
    fine = [finding for finding in analysis.findings if finding.severity == "fine"]
    parts: list[Part] = [
        build_verdict(analysis.findings, find_verdict(analysis.recording)),
        f"Capture self-check. {read_certificate(analysis.recording).as_sentence()}",
    ]
    headings = {"problem": "# Problems", "warning": "# Warnings", "note": "# Notes and inconclusive findings"}
    for severity, heading in headings.items():
        found = [finding for finding in analysis.findings if finding.severity == severity]
        parts += [heading, *(part for finding in found for part in _show_finding(finding))] if found else []
    if fine:
        columns = ("signature", "finding", "measured", "threshold", "source", "confidence")
        rows = [(f.signature, f.title, f.measured, f.threshold, f.source, f.confidence) for f in fine]
        parts += ["# Fine", Table(f"{len(fine)} checks without a symptom", columns, rows)]
    return Report("diagnostic", f"Run {analysis.recording.name}: findings", tuple(parts), collect_values(analysis))


def _show_finding(finding: Finding) -> Iterator[Part]:
    plain = [(name, value) for name, value in finding.evidence.items() if not isinstance(value, Mapping)]
    facts = (
        ("where", finding.where or "the whole run"),
        ("signature", finding.signature),
        ("measured", finding.measured),
        ("threshold", finding.threshold),
        ("source", finding.source),
        ("confidence", finding.confidence),
        ("what to do", finding.action),
        ("what would decide it", finding.decide),
        ("evidence", "\n".join(f"{name.replace('_', ' ')}: {_format_value(value)}" for name, value in plain)),
    )
    yield Callout(finding.severity, finding.title, tuple((name, words) for name, words in facts if words))
    yield from (_plot_curve(name, steps, values) for name, steps, values in find_curves(finding.evidence))


def find_curves(evidence: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, list[float], list[float]]]:
    """Name, steps and values of each curve in the evidence: a mapping with `steps` and `values` of one length > 1."""
    steps, values = evidence.get("steps"), evidence.get("values")
    if isinstance(steps, list) and isinstance(values, list) and len(steps) == len(values) > 1:
        yield name or "evidence", steps, values
    for key, inner in evidence.items():
        if isinstance(inner, Mapping):
            yield from find_curves(inner, key)


def _plot_curve(name: str, steps: list[float], values: list[float]) -> SvgPicture:
    words = name.replace("_", " ")
    curve = Curve(words, np.asarray(steps, float), np.asarray(values, float), COLOURS[0], dots=len(steps) <= MOST_DOTS)
    return SvgPicture(render_chart([curve], "step", words), "Evidence for the finding above.")


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        more = f" and {len(value) - NAMED} more" if len(value) > NAMED else ""
        return (", ".join(_format_value(each) for each in value[:NAMED]) or "none") + more
    return f"{value:.4g}" if isinstance(value, float) else str(value)
