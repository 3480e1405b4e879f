"""Two runs side by side in Python: what was set differently, and what came of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from training_lens.analysis.figures.style import add_line, build_canvas, escape_label
from training_lens.analysis.run_card import LOSS_AXES, loss_curves
from training_lens.display.colors import COLOURS
from training_lens.display.html import SvgPicture, Table, render_card
from training_lens.display.svg import Curve, render_chart
from training_lens.errors import CheckpointError
from training_lens.runs.run_listing import BROKEN, config_differences, have_same_validation, read_run

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

    from training_lens.analysis.run_reader import Run
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
OTHER_ROWS = "They were validated on different rows: their validation losses cannot be compared."
VALUE_SHOWN = 80  # characters of a setting


class RunComparison:
    """Two runs, read when it is made; in a notebook it shows itself. How alike the adapters are:
    `first.lens.compare(second.lens)`.

    Args:
        first, second: the runs.

    Raises:
        CheckpointError: a run's metadata are missing or broken.
    """

    def __init__(self, first: Run, second: Run) -> None:
        self.runs = (first, second)
        self._listed = [read_run(run.folder) for run in self.runs]
        for listed in self._listed:
            if listed.status == BROKEN:  # without settings: it would seem to differ in all of them
                raise CheckpointError(listed.detail)

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called: their ids, or their folders where these have one id."""
        first, second = self.runs
        if first.run_id != second.run_id:
            return first.run_id, second.run_id
        return str(first.folder.root), str(second.folder.root)

    @property
    def config(self) -> dict[str, tuple[Any, Any]]:
        """The settings in which they differ, by dotted key: the value of the first and of the second."""
        return {key: (values[0], values[1]) for key, values in config_differences(self._listed).items()}

    @property
    def metrics(self) -> DataFrame:
        """The numbers of summaries and reports (`compare.json`, `evaluation.json`): a row a number, a column a run."""
        import pandas

        columns = {name: run.metrics for name, run in zip(self.names, self._listed, strict=True)}
        return pandas.DataFrame(columns)

    @property
    def same_validation(self) -> bool:
        """Whether both were validated on the same rows, as far as their metadata tell: else their validation losses
        cannot be compared."""
        return have_same_validation(self._listed)

    def figure(self) -> Figure:
        """The losses of both on the same axes, to zoom into; validation is dashed."""
        figure = build_canvas(*LOSS_AXES, height=420)
        for curve in self._loss_curves():
            dash = "dash" if curve.dashed else "solid"
            add_line(figure, curve.steps, curve.values, escape_label(curve.name), color=curve.colour, dash=dash)
        return figure

    def _loss_curves(self) -> list[Curve]:
        pairs = enumerate(zip(self.runs, self.names, strict=True))
        return [curve for place, (run, name) in pairs for curve in loss_curves(run.log, name, COLOURS[place])]

    def __repr__(self) -> str:
        differ = f"they differ in {', '.join(self.config)}" if self.config else "no setting differs"
        return f"RunComparison of {self.names[0]} and {self.names[1]}: {differ}"

    def _repr_html_(self) -> str:
        drawing = render_chart(self._loss_curves(), *LOSS_AXES)
        settings = [(key, *map(_format_setting, values)) for key, values in self.config.items()]
        parts: list[Part] = [
            Table("", ("", *self.names), [("status", *(run.status for run in self._listed)), *self._number_rows()]),
            *([] if self.same_validation else [OTHER_ROWS]),
            Table("settings that differ", ("", *self.names), settings) if settings else "No setting differs.",
            SvgPicture(drawing, "Validation is dashed; at step 0 it is that of the base model.") if drawing else "",
        ]
        return render_card("Two runs", [part for part in parts if part])

    def _number_rows(self) -> list[tuple[str, ...]]:
        """The rows of the table: what at least one of the two knows."""
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
    return text if len(text) <= VALUE_SHOWN else f"{text[: VALUE_SHOWN - 1]}…"
