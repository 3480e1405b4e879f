"""The tables of `training-lens experiment`: folded for a terminal, or a line for each run where a program reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console

from training_lens.cli.common import show_table
from training_lens.config.schema import TrainingConfig
from training_lens.errors import CheckpointError, DamagedFileError
from training_lens.runs.metrics_log import read_logged_values
from training_lens.runs.run_listing import RunOverview, have_same_validation
from training_lens.utils.formatting import cut_text, format_size, pluralize, render_sparkline
from training_lens.utils.nested import find_differences, flatten_sections

GAP = 3  # characters between two columns
STEPS_SHOWN = 12  # validations that a table of losses lists
IN_PARTS = ("by_domain.", "by_leak.", "controls.")
VALUE_SHOWN = 120  # characters of a setting


def _print_rows(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> None:
    """Print a table without a frame; columns in `right` are right-aligned."""
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False}
    show_table(console, f"\n{title}", columns, rows, right, **style)


def _print_blocks(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows that are too wide for a table: the first cell on its own line, the others by name below it."""
    console.print(f"\n{title}", style="italic")
    for row in rows:
        console.print(row[0], markup=False, soft_wrap=True)
        rest = ", ".join(f"{name} {cell}" for name, cell in zip(columns[1:], row[1:], strict=True) if cell)
        console.print(f"  {rest}", markup=False)


def _format_metric(run: RunOverview, metric: str) -> str:
    value = run.metrics.get(metric)
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"


def _list_metrics(runs: Sequence[RunOverview]) -> list[str]:
    """The metrics that any of the runs has, without those of single domains and controls."""
    names = dict.fromkeys(metric for run in runs for metric in run.metrics)
    return [name for name in names if not name.startswith(IN_PARTS)]


def warn_of_other_rows(console: Console, runs: Sequence[RunOverview], metric: str) -> bool:
    """Warn if the runs with this metric were validated on different rows; returns whether they were."""
    differ = not have_same_validation([run for run in runs if metric in run.metrics])
    if differ:
        console.print("these runs were validated on different rows: their losses cannot be compared", soft_wrap=True)
    return differ


def show_runs(console: Console, runs: Sequence[RunOverview], metric: str) -> None:
    """Print a line for each run with one metric, then details on some of them."""
    columns = ["run", "status", "steps", metric, "model", "data", "rate"]
    rows = [
        [
            *(run.run_id, run.status, _format_metric(run, "steps"), _format_metric(run, metric)),
            *(run.model_name, run.data_name, "-" if run.learning_rate is None else f"{run.learning_rate:.3g}"),
        ]
        for run in runs
    ]
    if len({run.experiment_name for run in runs}) > 1:
        columns.insert(1, "experiment")
        for row, run in zip(rows, runs, strict=True):
            row.insert(1, run.experiment_name)
    if any(run.tags for run in runs):
        columns.append("tags")
        for row, run in zip(rows, runs, strict=True):
            row.append(", ".join(run.tags))
    title, numbers = pluralize(len(runs), "run"), ("steps", metric, "rate")
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    if console.is_terminal and sum(widths) + GAP * (len(widths) - 1) > console.width:
        _print_blocks(console, title, columns, rows)
    else:
        _print_rows(console, title, columns, rows, right=numbers)
    for run in runs:
        if run.detail:
            console.print(f"{run.run_id}: {run.detail}", markup=False, soft_wrap=True)


def collect_details(run: RunOverview) -> dict[str, Any]:
    """What `show` tells besides `ListedRun.as_json`: settings that are not the defaults, data, losses, reports.

    What cannot be read is left out; `run.detail` or "damaged" says why.
    """
    changed = find_differences([flatten_sections(TrainingConfig().model_dump()), run.config]) if run.config else {}
    damaged = ""
    try:
        data = run.folder.read_metadata("data.json")
        files = {name: data[name]["examples_by_file"] for name in ("train", "validation") if name in data}
    except DamagedFileError as error:
        files, damaged = {}, str(error)
    except (CheckpointError, KeyError, TypeError):
        files = {}
    return {
        "damaged": damaged,
        "config": {key: mine for key, (_, mine) in changed.items()},
        "data": files,
        "losses": {
            kind: read_logged_values(run.folder, kind, "step", "loss") for kind in ("base", "validation", "step")
        },
        "reports": sorted(path.name for path in run.folder.reports.glob("*") if path.is_file()),
    }


def show_details(console: Console, run: RunOverview, details: Mapping[str, Any]) -> None:
    """What `collect_details` gives, in sections; those that are empty are left out."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(f"{run.run_id} of experiment {run.experiment_name or '(none)'}: {run.status}")
    if run.detail:
        say(f"  {run.detail}")
    if details["damaged"]:
        say(f"  {details['damaged']}")
    say(f"  started {run.start_time:%Y-%m-%d %H:%M:%S} UTC, in {run.folder.root}")
    if run.tags:
        say(f"  tags: {', '.join(run.tags)}")
    if run.metrics:
        rows = [[metric, _format_metric(run, metric)] for metric in _list_metrics([run])]
        _print_rows(console, "metrics", ("", "value"), rows, right=("value",))
    if details["config"]:
        rows = [[key, _format_value(value)] for key, value in details["config"].items()]
        _print_rows(console, "settings that are not the defaults", ("", "value"), rows)
    files = [
        [split, _shorten_path(name), f"{count:,}"]
        for split, each in details["data"].items()
        for name, count in each.items()
    ]
    if files:
        _print_rows(console, "data", ("", "file", "examples"), files, right=("examples",))
    _show_losses(console, details["losses"])
    if details["reports"]:
        say(f"reports: {', '.join(details['reports'])}")


def _shorten_path(name: str) -> str:
    """The last two parts of a path; `--json` has the whole."""
    parts = name.split("/")
    return name if len(parts) <= 2 else f".../{'/'.join(parts[-2:])}"


def _show_losses(console: Console, losses: Mapping[str, Sequence[Sequence[float]]]) -> None:
    steps = [loss for _, loss in losses["step"]]
    if steps:
        first, last = losses["step"][0][0], losses["step"][-1][0]
        console.print(f"training loss, steps {first} to {last}: {steps[0]:.4f} to {steps[-1]:.4f}", markup=False)
        console.print(f"  {render_sparkline(steps)}", markup=False)
    validated = [*losses["base"], *losses["validation"]]
    if validated:
        left_out = len(validated) - STEPS_SHOWN
        shown = validated if left_out <= 0 else [validated[0], *validated[-STEPS_SHOWN + 1 :]]
        title = "validation loss" + (f" ({left_out} validations after the first left out)" if left_out > 0 else "")
        rows = [[f"{step:,}" if step else "0 (base)", f"{loss:.4f}"] for step, loss in shown]
        _print_rows(console, title, ("step", "loss"), rows, right=("step", "loss"))


def _format_value(value: Any) -> str:
    return cut_text(json.dumps(value, ensure_ascii=False), VALUE_SHOWN)


def show_comparison(console: Console, runs: Sequence[RunOverview], differing: Mapping[str, Sequence[Any]]) -> None:
    """Print metrics and settings, a column for each run; equal settings are left out."""
    ids = [run.run_id for run in runs]
    rows = [[metric, *(_format_metric(run, metric) for run in runs)] for metric in _list_metrics(runs)]
    _print_rows(console, "metrics", ("", *ids), [["status", *(run.status for run in runs)], *rows], right=ids)
    if differing:
        rows = [[key, *(_format_value(value) for value in values)] for key, values in differing.items()]
        _print_rows(console, "settings that differ", ("", *ids), rows)
    else:
        console.print("no setting differs")


def show_doomed(console: Console, runs: Sequence[RunOverview], sizes: Sequence[int]) -> None:
    """Print what would be deleted: each run's status, size and content."""
    rows = [
        [run.run_id, run.status, format_size(size), _list_parts(run), ", ".join(run.tags)]
        for run, size in zip(runs, sizes, strict=True)
    ]
    _print_rows(console, "to delete", ("run", "status", "size", "holds", "tags"), rows, right=("size",))


def _list_parts(run: RunOverview) -> str:
    folder = run.folder
    held = {
        "checkpoints": len(list(folder.checkpoints.glob("step-*"))),
        "reports": len(list(folder.reports.glob("*"))),
    }
    counted = [f"{count} {name if count > 1 else name[:-1]}" for name, count in held.items() if count]
    return ", ".join(["adapter", *counted] if folder.adapter.is_dir() else counted)
