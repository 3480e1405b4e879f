"""The technical report: all tables and figures of a run; and two runs side by side, on the same scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from training_lens.analysis.checkpoint_analyzer import AdapterComparison, Analysis, compare_adapters
from training_lens.analysis.figures.catalogue import REPORT_FIGURES
from training_lens.analysis.figures.run_figures import plot_cost, plot_loss
from training_lens.analysis.figures.style import match_scales
from training_lens.analysis.reports.executive import WRONG, build_verdict, collect_values
from training_lens.analysis.reports.report_files import Report
from training_lens.analysis.run_facts import (
    cost_sentence,
    find_verdict,
    list_captured,
    list_missing,
    read_certificate,
    read_changes,
    read_losses,
)
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.display.html import BulletList, Part, Picture, PictureGrid, Table
from training_lens.errors import LensError
from training_lens.runs.checkpoint_format import list_checkpoint_steps
from training_lens.runs.run_folder import RunFolder

MOST_ROWS = 300  # of one table; the JSON has all
COST_CAPTION = "Seconds in the training process by collector, plus shared work (module batches, probe, flush)."
LOSS_CAPTION = (
    "Lower is better. Dashed vertical lines: epoch ends. Star: best validation. Triangles: checkpoints (or adapter "
    "snapshots if there are none). Cross: a loss that is not finite (drawn at the highest loss) or a spike (6 robust "
    "deviations above the median of 21 steps)."
)


def build_technical(analysis: Analysis) -> Report:
    """The technical report of a run, with the results of every registered analyzer."""
    recording, absent = analysis.recording, list_missing(analysis.recording)
    sizes = [f"{count:,} {what.replace('_', ' ')}" for what, count in (recording.manifest.probe or {}).items()]
    undrawn = [figure.title for figure in REPORT_FIGURES if not recording.has(*figure.needs)]
    drawn = [figure for figure in REPORT_FIGURES if figure.title not in undrawn]
    parts: list[Part] = [
        f"Run {recording.name}, {recording.status}; captured in {recording.manifest.origin}.",
        build_verdict(analysis.findings, find_verdict(analysis.recording)),
        "# Did it learn?",
        read_losses(recording).as_sentence(recording.manifest.origin),
        *(["# Findings", _findings_table(analysis)] if analysis.findings else []),
        "# Loss and events",
        Picture("Loss", plot_loss(recording, marked_steps(recording)), LOSS_CAPTION),
        "# Which layers changed?",
        read_changes(recording).as_sentence(),
        *(Picture(figure.title, figure.draw(recording), figure.caption) for figure in drawn),
        *([f"Not drawn because no data was captured: {'; '.join(undrawn)}."] if undrawn else []),
        "# Captured data",
        f"Capture self-check. {read_certificate(recording).as_sentence()}",
        _captured_table(recording),
        *([f"Probe set: {', '.join(sizes)}."] if sizes else []),
        *(["Not captured:", BulletList(absent)] if absent else []),
        *_analyzer_tables(analysis.results),
        "# Cost of the capture",
        cost_sentence(recording),
        *([Picture("Seconds by collector", plot_cost(recording), COST_CAPTION)] if recording.captures.cost() else []),
    ]
    return Report("technical", f"Run {recording.name}: technical report", tuple(parts), collect_values(analysis))


def marked_steps(recording: Recording) -> list[int]:
    """The steps of the run's checkpoints, or of the adapter snapshots if there are none."""
    checkpoints = RunFolder(recording.folder).checkpoints
    return list_checkpoint_steps(checkpoints) or recording.captures.snapshot_steps(tables.SNAPSHOTS)


def _captured_table(recording: Recording) -> Table:
    rows = [
        (name, kind, f"{steps:,}", f"{last:,}", str(each)) for name, kind, steps, last, each in list_captured(recording)
    ]
    kinds = ", ".join(dict.fromkeys(m.kind for m in recording.modules))
    ranks = ", ".join(map(str, sorted({m.rank for m in recording.modules})))
    caption = f"{len(recording.modules)} adapted modules ({kinds}), rank {ranks}"
    return Table(caption, ("table", "data type", "steps", "last step", "rows a step"), rows)


def _findings_table(analysis: Analysis) -> Table:
    columns = ("finding", "severity", "what to do", "measured", "where", "confidence")
    rows = [(f.title, f.severity, f.action or f.decide, f.measured, f.where, f.confidence) for f in analysis.findings]
    return Table("all checks; the diagnostic report has thresholds, sources and evidence", columns, rows)


def _analyzer_tables(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Part]:
    """Analyzer results: single values in one table, and one table per list of rows."""
    for name, values in results.items():
        yield f"# Analyzer {name}"
        single, lists = dict[str, str](), dict[str, Sequence[Mapping[str, Any]]]()
        for key, value in values.items():
            if isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
                lists[key] = value
            else:
                single |= dict(_flatten_value(key, value))
        if single:
            yield Table("values", ("what", "value"), list(single.items())[:MOST_ROWS])
        for key, rows in lists.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            shown = [[format_cell(row.get(column)) for column in columns] for row in rows[:MOST_ROWS]]
            more = f" (the first {MOST_ROWS} of {len(rows)})" if len(rows) > MOST_ROWS else ""
            yield Table(f"{key}{more}", columns, shown)


def _flatten_value(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Nested values as rows named by their path."""
    if isinstance(value, Mapping):
        for inner, each in value.items():
            yield from _flatten_value(f"{key}, {inner}", each)
    else:
        yield key.replace("_", " "), format_cell(value)


def format_cell(value: Any) -> str:
    """A value in a table: floats with four digits, the ends of long lists, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        ends = [*value[:3], "...", *value[-2:]] if len(value) > 8 else value
        return ", ".join(format_cell(each) for each in ends) or "none"
    return str(value)


def comparison(first: Analysis, second: Analysis) -> Report:
    """Two runs side by side. The last snapshots are compared by principal angles, or the report says why not."""
    pair = (first, second)
    names = (f"A: {first.recording.name}", f"B: {second.recording.name}")
    similarity, reason = None, ""
    try:
        similarity = compare_adapters(first.recording, second.recording)
    except LensError as error:
        reason = str(error)
    parts: list[Part] = [
        Table("The two runs", ("", *names), list(_fact_rows(pair))),
        "# Similarity of the updates",
        *(_describe_similarity(similarity) if similarity else [f"Not compared: {reason}"]),
        "# Figures on the same scales",
        *_paired_pictures(names, first.recording, second.recording),
    ]
    values: dict[str, Any] = {
        "runs": [collect_values(each) for each in pair],
        "likeness": similarity.values() if similarity else None,
    }
    if reason:
        values["not_compared"] = reason
    return Report("comparison", f"{names[0]} and {names[1]}", tuple(parts), values)


def _fact_rows(pair: tuple[Analysis, Analysis]) -> Iterator[tuple[str, str, str]]:
    recordings = [analysis.recording for analysis in pair]
    losses = [read_losses(recording) for recording in recordings]
    rows: Mapping[str, list[object]] = {
        "status": [r.status for r in recordings],
        "adapted modules": [len(r.modules) for r in recordings],
        "rank": [sorted({m.rank for m in r.modules}) for r in recordings],
        "base validation loss": [each.base for each in losses],
        "best validation loss": [each.best for each in losses],
        "at step": [each.best_step for each in losses],
        "training loss at the end": [each.last for each in losses],
        "largest capture error": [read_certificate(r).largest for r in recordings],
        "which layers changed": [read_changes(r).as_sentence() for r in recordings],
        "problems and warnings": ["\n".join(f.title for f in a.findings if f.severity in WRONG) or "-" for a in pair],
    }
    for name, (one, other) in rows.items():
        yield name, format_cell(one), format_cell(other)


def _describe_similarity(found: AdapterComparison) -> Iterator[Part]:
    yield (
        f"Adapter A after step {found.steps[0]}, adapter B after step {found.steps[1]}. Cosine of the updates: 1 is "
        "the same direction, 0 is orthogonal. Principal angles are between the column spaces (outputs) and row spaces "
        "(inputs) of the strongest directions: 0° is the same subspace, 90° is orthogonal."
    )
    angles = [column for space in ("column", "row") for column in (f"smallest {space} angle", "median", "largest")]
    columns = ("module", "cosine", *angles)
    rows = [
        (name, f"{each.cosine:.3f}", *_format_angles(each.columns), *_format_angles(each.rows))
        for name, each in found.modules.items()
    ]
    yield Table("principal angles in degrees, by module", columns, rows)
    for which, names in (("A", found.only_first), ("B", found.only_second)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if names[5:] else "")
            yield f"{len(names)} modules are adapted only in {which}: {shown}."


def _format_angles(angles: tuple[float, ...]) -> tuple[str, str, str]:
    if not angles:
        return ("-", "-", "-")
    degrees = np.degrees(angles)
    smallest, middle, largest = (f"{value:.1f}" for value in (degrees[0], np.median(degrees), degrees[-1]))
    return smallest, middle, largest


def _paired_pictures(names: tuple[str, str], first: Recording, second: Recording) -> Iterator[Part]:
    pair = (first, second)
    one, other = match_scales(*(plot_loss(recording, marked_steps(recording)) for recording in pair))
    yield "# Loss"
    yield PictureGrid([Picture(names[0], one, LOSS_CAPTION), Picture(names[1], other, "Same axes as A.")])
    absent = []
    for figure in REPORT_FIGURES:
        if all(recording.has(*figure.needs) for recording in pair):
            one, other = match_scales(*(figure.draw(recording) for recording in pair))
            yield f"# {figure.title}"
            yield PictureGrid([Picture(names[0], one, figure.caption), Picture(names[1], other, "Same scales as A.")])
        else:
            absent.append(figure.title)
    if absent:
        yield f"Not drawn because one run has no data for it: {'; '.join(absent)}."
