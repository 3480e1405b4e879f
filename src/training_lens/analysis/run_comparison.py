"""Two runs side by side in Python: different settings and their results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from training_lens.analysis.figures.style import add_line, build_canvas, escape_label
from training_lens.analysis.logs import read_our_log
from training_lens.analysis.run_card import LOSS_AXES, loss_curves
from training_lens.display.colors import COLOURS
from training_lens.display.html import SvgPicture, Table, render_card
from training_lens.display.svg import Curve, render_chart
from training_lens.errors import CheckpointError
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_listing import BROKEN, config_differences, have_same_validation, read_run

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from training_lens.display.html import Part

SHOWN = (
    "steps",
    "train_loss",
    "base_validation_loss",
    "validation_loss",
    "tokens",
    "tokens_per_second",
    "seconds",
    "peak_bytes",
    "trainable_parameters",
)
DIFFERENT_ROWS = "They were validated on different rows: their validation losses cannot be compared."
LONGEST_VALUE = 80  # characters of a setting


class RunComparison:
    """The settings, numbers and losses of two runs, read once. A notebook shows it as a card.

    `first.lens.compare(second.lens)` compares the adapters.

    Raises:
        CheckpointError: the metadata of a run is missing or broken.
    """

    def __init__(self, first: RunFolder, second: RunFolder) -> None:
        self._folders = (first, second)
        self._listed = [read_run(folder) for folder in self._folders]
        for listed in self._listed:
            if listed.status == BROKEN:  # without its settings, all of them would seem to differ
                raise CheckpointError(listed.detail)

    @property
    def names(self) -> tuple[str, str]:
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

        columns = {name: run.metrics for name, run in zip(self.names, self._listed, strict=True)}
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
            add_line(figure, curve.steps, curve.values, escape_label(curve.name), color=curve.colour, dash=dash)
        return figure

    def _loss_curves(self) -> list[Curve]:
        logs = [read_our_log(folder.metrics_file) for folder in self._folders]
        pairs = zip(logs, self.names, COLOURS, strict=False)
        return [curve for log, name, colour in pairs for curve in loss_curves(log, name, colour)]

    def __repr__(self) -> str:
        differ = f"they differ in {', '.join(self.config)}" if self.config else "no setting differs"
        return f"RunComparison of {self.names[0]} and {self.names[1]}: {differ}"

    def _repr_html_(self) -> str:
        chart = render_chart(self._loss_curves(), *LOSS_AXES)
        settings = [(key, *map(_format_setting, values)) for key, values in self.config.items()]
        parts: list[Part] = [
            Table("", ("", *self.names), [("status", *(run.status for run in self._listed)), *self._number_rows()]),
            *([] if self.same_validation else [DIFFERENT_ROWS]),
            Table("settings that differ", ("", *self.names), settings) if settings else "No setting differs.",
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


def _format_setting(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
