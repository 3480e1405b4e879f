"""Two runs side by side: figures on the same scales, findings, and the angles between their updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from training_lens.analysis.checkpoint_analyzer import AdapterComparison, Analysis, compare_adapters
from training_lens.analysis.figures.catalogue import REPORT_FIGURES
from training_lens.analysis.figures.run_figures import plot_loss
from training_lens.analysis.figures.style import match_scales
from training_lens.analysis.reports.executive import WRONG, collect_values
from training_lens.analysis.reports.standard import Report
from training_lens.analysis.reports.technical import LOSS_CAPTION, format_cell, marked_steps
from training_lens.analysis.run_facts import read_certificate, read_changes, read_losses
from training_lens.core.recording import Recording
from training_lens.display.html import Part, Picture, PictureGrid, Table
from training_lens.errors import LensError


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
