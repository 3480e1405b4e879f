"""The diagnostic report: each finding with evidence, threshold, source, confidence and action."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from training_lens.analysis.checkpoint_analyzer import Analysis
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.reports.executive import build_verdict, collect_values
from training_lens.analysis.reports.standard import Report
from training_lens.analysis.run_facts import find_verdict, read_certificate
from training_lens.display.colors import COLOURS
from training_lens.display.html import Callout, Part, SvgPicture, Table
from training_lens.display.svg import Curve, render_chart

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
