"""How a notebook shows a run: its numbers, its losses as a drawing, and what the lens found so far."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training_lens.analysis.figures.run_figures import is_long, smooth_line
from training_lens.analysis.reports.executive import WRONG, build_verdict, summarize_finding
from training_lens.analysis.run_verdict import find_verdict
from training_lens.core import table_names as tables
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, SvgPicture, Table, render_card
from training_lens.display.svg import Curve, render_chart
from training_lens.errors import TrainingLensError
from training_lens.models.adapters import describe
from training_lens.utils.formatting import format_count, format_seconds

if TYPE_CHECKING:
    from training_lens.analysis.logs import Log
    from training_lens.analysis.run_reader import Run
    from training_lens.display.html import Part

LOSS_AXES = ("step", "loss, nats per supervised token")


def run_card(run: Run) -> str:
    """HTML of some kB, without a script; what data says in it is escaped."""
    drawing = render_chart([*loss_curves(run.log)], *LOSS_AXES)
    parts: list[Part] = [
        Table("", ("run", run.run_id), list(_fact_rows(run))),
        SvgPicture(drawing, "At step 0: the base model.") if drawing else "No step is done yet.",
        *_found(run),
    ]
    return render_card(f"Run {run.run_id}: {run.status}", parts)


def loss_curves(log: Log, name: str = "", colour: str | None = None) -> Iterator[Curve]:
    """Training and validation loss; of long runs, the training loss as medians of equal parts.

    Args:
        name: of the run, where several are drawn together.
        colour: of both lines, where several runs are drawn together; validation is dashed then.
    """
    training, judged = log.series(tables.LOSS, "loss"), log.series(tables.EVALUATION, "loss")
    base = log.series(tables.EVALUATION, "base_loss")
    if training.values.size:
        steps, values = training.steps, training.values[:, 0]
        kind = "training, median of equal parts" if is_long(steps) else "training"
        line = smooth_line(steps, values) if is_long(steps) else (steps, values)
        yield Curve(f"{name} {kind}".strip(), *line, colour or COLOURS[0])
    steps = np.concatenate([base.steps, judged.steps])
    if steps.size:
        values = np.concatenate([base.values.ravel(), judged.values.ravel()])
        called = f"{name} validation".strip()
        yield Curve(called, steps, values, colour or COLOURS[2], dots=True, dashed=colour is not None)


def _fact_rows(run: Run) -> Iterator[tuple[str, str]]:
    """The rows of the table; what is not known yet is left out."""
    config, told = run.config, run.summary
    yield "model", config.model.id
    yield "adapter", describe(config.peft)
    if trainable := told.get("trainable_parameters"):
        yield "trains", f"{format_count(trainable)} of {format_count(told['total_parameters'])} parameters"
    yield "steps", f"{told['steps']:,.0f} in {format_seconds(told['seconds'])}"
    for name in ("train_loss", "base_validation_loss", "validation_loss"):
        if (loss := told.get(name)) is not None:
            yield name.replace("_", " "), f"{loss:.4f}"
    if (speed := told.get("tokens_per_second")) is not None:
        yield "tokens a second", f"{speed:,.0f}"
    yield "folder", _from_here(run.folder.root)


def _from_here(folder: Path) -> str:
    """Below the working directory, the relative path: a notebook that is passed on says nothing of its machine."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _found(run: Run) -> Iterator[Part]:
    try:
        findings = run.findings
    except TrainingLensError as error:
        yield f"The lens tells nothing: {error}"
        return
    yield build_verdict(findings, find_verdict(run.lens.recording))
    if others := [summarize_finding(finding) for finding in findings if finding.severity in WRONG][1:]:
        yield BulletList(others)
