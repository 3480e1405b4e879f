"""A run in a notebook as a card of numbers, losses and findings; and two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training_lens.analysis.figures.run_figures import is_long, smooth_line
from training_lens.analysis.figures.style import add_line, build_canvas
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.logs import Log, read_our_log
from training_lens.analysis.reports.executive import WRONG, build_verdict, summarize_finding
from training_lens.analysis.run_facts import find_verdict
from training_lens.config.run_config import read_run_config
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, Part, SvgPicture, Table, render_card
from training_lens.display.svg import Curve, render_chart
from training_lens.errors import CheckpointError
from training_lens.models.adapters import describe_adapter
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_listing import BROKEN, config_differences, have_same_validation, read_run
from training_lens.utils.formatting import cut_text, format_count, format_seconds

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure


LOSS_AXES = ("step", "loss, nats per supervised token")
SHOWN = (
    *("steps", "train_loss", "base_validation_loss", "validation_loss", "tokens", "tokens_per_second", "seconds"),
    *("peak_bytes", "trainable_parameters"),
)
DIFFERENT_ROWS = "They were validated on different rows: their validation losses cannot be compared."
LONGEST_VALUE = 80  # characters of a setting


def run_card(run: RunFolder, summary: Mapping[str, Any], lens: Sequence[Part]) -> str:
    """HTML of a few kB without a script, of a run's numbers so far and what `lens_parts` gives; text is escaped."""
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

    Of several runs in one chart, each has a name and a colour for both lines; validation is dashed then.
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
    # relative to the working directory if below it, so that shared notebooks do not show the machine
    yield "folder", str(run.root.relative_to(Path.cwd()) if run.root.is_relative_to(Path.cwd()) else run.root)


class RunComparison:
    """The settings, numbers and losses of two runs, read once; a card in a notebook. `Run.lens` compares adapters."""

    def __init__(self, first: RunFolder, second: RunFolder) -> None:
        self._folders = (first, second)
        self._listed = [read_run(folder) for folder in self._folders]
        for listed in self._listed:
            if listed.status == BROKEN:  # without its settings, all of them would seem to differ
                raise CheckpointError(listed.detail)

    @property
    def run_names(self) -> tuple[str, str]:
        """The two run ids, or the two folders if both runs have the same id."""
        first, second = self._folders
        if first.run_id != second.run_id:
            return first.run_id, second.run_id
        return str(first.root), str(second.root)

    @property
    def config(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ: the first and the second value by dotted key."""
        return {key: (values[0], values[1]) for key, values in config_differences(self._listed).items()}

    @property
    def metrics(self) -> DataFrame:
        """Numbers of the summaries, `compare.json` and `evaluation.json`: a row per number, a column per run."""
        import pandas

        columns = {name: run.metrics for name, run in zip(self.run_names, self._listed, strict=True)}
        return pandas.DataFrame(columns)

    @property
    def same_validation(self) -> bool:
        """Whether both used the same validation rows, as far as the metadata shows. If not, do not compare their
        validation losses."""
        return have_same_validation(self._listed)

    def figure(self) -> Figure:
        """Both runs' losses on the same axes, zoomable; validation is dashed."""
        figure = build_canvas(*LOSS_AXES, height=420)
        for curve in self._loss_curves():
            dash = "dash" if curve.dashed else "solid"
            add_line(figure, curve.steps, curve.values, escape(curve.name), color=curve.colour, dash=dash)
        return figure

    def _loss_curves(self) -> list[Curve]:
        logs = [read_our_log(folder.metrics_file) for folder in self._folders]
        pairs = zip(logs, self.run_names, COLOURS, strict=False)
        return [curve for log, name, colour in pairs for curve in loss_curves(log, name, colour)]

    def __repr__(self) -> str:
        differ = f"they differ in {', '.join(self.config)}" if self.config else "no setting differs"
        return f"RunComparison of {self.run_names[0]} and {self.run_names[1]}: {differ}"

    def _repr_html_(self) -> str:
        chart = render_chart(self._loss_curves(), *LOSS_AXES)
        settings = [
            (key, *(cut_text(json.dumps(value, ensure_ascii=False), LONGEST_VALUE) for value in both))
            for key, both in self.config.items()
        ]
        parts: list[Part] = [
            Table("", ("", *self.run_names), [("status", *(run.status for run in self._listed)), *self._number_rows()]),
            *([] if self.same_validation else [DIFFERENT_ROWS]),
            Table("settings that differ", ("", *self.run_names), settings) if settings else "No setting differs.",
            SvgPicture(chart, "Validation is dashed; at step 0 it is that of the base model.") if chart else "",
        ]
        return render_card("Two runs", [part for part in parts if part])

    def _number_rows(self) -> list[tuple[str, ...]]:
        """Table rows: numbers that at least one run has."""
        rows = [(name, [run.metrics.get(name) for run in self._listed]) for name in SHOWN]
        return [
            (name.replace("_", " "), *map(_format_number, values)) for name, values in rows if values != [None, None]
        ]


def _format_number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4f}"
