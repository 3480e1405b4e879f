"""A run in a notebook: its numbers, a chart of its losses, and the findings so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training_lens.analysis.figures.run_figures import is_long, smooth_line
from training_lens.analysis.logs import Log, read_our_log
from training_lens.analysis.reports.executive import WRONG, build_verdict, summarize_finding
from training_lens.analysis.run_verdict import find_verdict
from training_lens.config.run_config import read_run_config
from training_lens.core import table_names as tables
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, SvgPicture, Table, render_card
from training_lens.display.svg import Curve, render_chart
from training_lens.models.adapters import describe_adapter
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import format_count, format_seconds

if TYPE_CHECKING:
    from training_lens.analysis.findings import Finding
    from training_lens.core.recording import Recording
    from training_lens.display.html import Part

LOSS_AXES = ("step", "loss, nats per supervised token")


def run_card(run: RunFolder, summary: Mapping[str, Any], lens: Sequence[Part]) -> str:
    """HTML of a few kB without a script; text from data is escaped.

    Args:
        summary: the run's numbers so far (see `Run.summary`).
        lens: what the lens found, as `lens_parts` gives it.
    """
    chart = render_chart([*loss_curves(read_our_log(run.metrics_file))], *LOSS_AXES)
    parts: list[Part] = [
        Table("", ("run", run.run_id), list(_fact_rows(run, summary))),
        SvgPicture(chart, "At step 0: the base model.") if chart else "No step has finished yet.",
        *lens,
    ]
    return render_card(f"Run {run.run_id}: {summary['status']}", parts)


def lens_parts(findings: Sequence[Finding], recording: Recording) -> list[Part]:
    """The verdict, and the other problems and warnings."""
    others = [summarize_finding(finding) for finding in findings if finding.severity in WRONG][1:]
    return [build_verdict(findings, find_verdict(recording)), *([BulletList(others)] if others else [])]


def loss_curves(log: Log, name: str = "", colour: str | None = None) -> Iterator[Curve]:
    """Training and validation loss; for long runs, the training loss as medians of equal parts.

    Args:
        name: the name of the run if several are drawn together.
        colour: of both lines if several runs are drawn together; validation is dashed then.
    """
    training, validation = log.series(tables.LOSS, "loss"), log.series(tables.EVALUATION, "loss")
    base = log.series(tables.EVALUATION, "base_loss")
    if training.values.size:
        steps, values = training.steps, training.values[:, 0]
        kind = "training, median of equal parts" if is_long(steps) else "training"
        line = smooth_line(steps, values) if is_long(steps) else (steps, values)
        yield Curve(f"{name} {kind}".strip(), *line, colour or COLOURS[0])
    steps = np.concatenate([base.steps, validation.steps])
    if steps.size:
        values = np.concatenate([base.values.ravel(), validation.values.ravel()])
        called = f"{name} validation".strip()
        yield Curve(called, steps, values, colour or COLOURS[2], dots=True, dashed=colour is not None)


def _fact_rows(run: RunFolder, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of the table; unknown values are left out."""
    config = read_run_config(run)
    yield "model", config.model.id
    yield "adapter", describe_adapter(config.peft)
    if trainable := summary.get("trainable_parameters"):
        yield "trains", f"{format_count(trainable)} of {format_count(summary['total_parameters'])} parameters"
    yield "steps", f"{summary['steps']:,.0f} in {format_seconds(summary['seconds'])}"
    for name in ("train_loss", "base_validation_loss", "validation_loss"):
        if (loss := summary.get(name)) is not None:
            yield name.replace("_", " "), f"{loss:.4f}"
    if (speed := summary.get("tokens_per_second")) is not None:
        yield "tokens a second", f"{speed:,.0f}"
    yield "folder", _from_here(run.root)


def _from_here(folder: Path) -> str:
    """The path relative to the working directory if below it, so that shared notebooks do not show the machine."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
