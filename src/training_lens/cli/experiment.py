"""`training-lens experiment`: the runs that there are; which is best, how they differ, tags, deletion."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_lens.cli.common import Screen, command, load_config, refuse_unused
from training_lens.cli.options import CommandOptions, ConfigOptions, add_command
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.runs.run_listing import RunOverview

BASE = ("output.base_output_dir",)
METRIC = "validation_loss"

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="Where the runs are: output.base_output_dir=FOLDER.", metavar="[KEY=VALUE]...", show_default=False
    ),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's id, its folder, or 'latest', whatever became of it.")
]
RunNames = Annotated[
    list[str], typer.Argument(metavar="RUN... [KEY=VALUE]...", help="Ids, folders, or 'latest'; then settings.")
]
Tags = Annotated[list[str], typer.Argument(metavar="TAG... [KEY=VALUE]...", help="Short words; then settings.")]
Sort = Annotated[str | None, typer.Option(metavar="METRIC", help="Sort by it, the best first; else the newest first.")]
Status = Annotated[
    Literal["running", "finished", "failed", "interrupted", "pruned", "broken"] | None,
    typer.Option(help="Only runs of which this became.", show_choices=True),
]
WithTag = Annotated[str | None, typer.Option("--tag", metavar="TAG", help="Only runs with this tag.")]
Mirror = Annotated[
    str | None, typer.Option(metavar="PLACE", help="The runs of a mirror, as output.mirror names it: s3://bucket/path.")
]
Name = Annotated[str | None, typer.Option(metavar="EXPERIMENT", help="Only this experiment's runs; else all.")]
Metric = Annotated[str, typer.Option(metavar="METRIC", help="Any metric of the runs, such as adapter.exact_match.")]
Most = Annotated[
    bool | None,
    typer.Option("--max/--min", help="Which end is best; else: losses, seconds and bytes low, all else high."),
]
Remove = Annotated[bool, typer.Option("--remove", help="Take the tags away.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@dataclass(frozen=True)
class RunsOptions(CommandOptions):
    """The options of a command on the runs of a folder."""

    overrides: Settings = None


experiment = typer.Typer(
    name="experiment",
    help="The runs that there are: list, show, compare, best, tag, delete.",
    no_args_is_help=True,
    add_completion=False,
)


def _find_base(options: CommandOptions) -> str:
    """The folder that the runs are in."""
    refuse_unused(options.words, BASE, "experiment looks at runs, and trains none.")
    return load_config(options).output.base_output_dir


def _split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """The names and the settings of one list of arguments."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def _find_runs(words: list[str], options: ConfigOptions) -> list[RunOverview]:
    """The runs that the arguments name."""
    from training_lens.runs.run_listing import find_runs

    names, settings = _split_words(words)
    return find_runs(names, _find_base(options.with_words(settings)))


@add_command(experiment, "list")
def list_(
    sort: Sort = None,
    status: Status = None,
    tag: WithTag = None,
    name: Name = None,
    mirror: Mirror = None,
    *,
    options: RunsOptions,
) -> None:
    """A table of the runs: what became of each, its steps and loss, and its tags; of those here, or of a mirror."""
    with command(options) as screen, TemporaryDirectory() if mirror else nullcontext("") as cache:
        from training_lens.cli.run_tables import show_runs, warn_of_other_rows
        from training_lens.runs.run_listing import read_runs, sort_runs

        base = mirror or _find_base(options)
        if mirror:
            from training_lens.integrations.remote_run import read_remote_runs
            from training_lens.integrations.storage import open_storage

            known = read_remote_runs(open_storage(mirror), name, Path(cache))
        else:
            known = read_runs(base, name)
        runs = [run for run in known if status in (None, run.status) and (tag is None or tag in run.tags)]
        runs = sort_runs(runs, sort) if sort and runs else runs
        if runs:
            show_runs(screen.console, runs, sort or METRIC)
            if sort:
                warn_of_other_rows(screen.console, runs, sort)
        else:
            screen.print_line(f"no such runs in {base}")
        screen.print_result({"base": base, "runs": [run.as_json() for run in runs]})


@add_command(experiment)
def show(run: RunName, options: RunsOptions) -> None:
    """One run: its numbers, the settings that are not the defaults, its data, its losses on the way, its reports."""
    with command(options) as screen:
        from training_lens.cli.run_tables import collect_details, show_details
        from training_lens.runs.run_listing import find_runs

        (found,) = find_runs([run], _find_base(options))
        details = collect_details(found)
        show_details(screen.console, found, details)
        screen.print_result({**found.as_json(), **details})


@add_command(experiment)
def compare(runs: RunNames, options: ConfigOptions) -> None:
    """Metrics of some runs side by side, and the settings in which they differ."""
    with command(options) as screen:
        from training_lens.cli.run_tables import show_comparison
        from training_lens.runs.run_listing import config_differences

        found = _find_runs(runs, options)
        if len(found) < 2:
            raise ConfigurationError(f"compare takes two runs or more, given {len(found)}.")
        differing = config_differences(found)
        show_comparison(screen.console, found, differing)
        screen.print_result({"runs": [run.as_json() for run in found], "config": differing})


@add_command(experiment)
def best(metric: Metric = METRIC, highest: Most = None, name: Name = None, *, options: RunsOptions) -> None:
    """The finished run with the best value of a metric."""
    with command(options) as screen:
        from training_lens.cli.run_tables import warn_of_other_rows
        from training_lens.runs.run_listing import best_run, read_runs

        runs = [run for run in read_runs(_find_base(options), name) if run.status == "finished"]
        found = best_run(runs, metric, None if highest is None else not highest)
        value = found.metrics[metric]
        screen.print_line(f"{found.run_id}  {metric} {value:.6g}")
        screen.print_line(f"  in {found.folder.root}")
        differ = warn_of_other_rows(screen.console, runs, metric)
        screen.print_result({"metric": metric, "value": value, "same_validation": not differ, "run": found.as_json()})


@add_command(experiment)
def tag(run: RunName, tags: Tags, remove: Remove = False, *, options: ConfigOptions) -> None:
    """Put tags on a run, or take them away; `list --tag` finds it by them."""
    with command(options) as screen:
        from training_lens.runs.housekeeping import change_tags

        words, settings = _split_words(tags)
        (found,) = _find_runs([run, *settings], options)
        kept = change_tags(found.folder, words, remove=remove)
        screen.print_line(f"{found.run_id}: {', '.join(kept) or 'no tags'}")
        screen.print_result({"run": found.run_id, "path": str(found.folder.root), "tags": list(kept)})


@add_command(experiment)
def delete(runs: RunNames, yes: Yes = False, *, options: ConfigOptions) -> None:
    """Delete runs with everything in their folders: says what goes, and asks first."""
    with command(options) as screen:
        from training_lens.cli.run_tables import show_doomed
        from training_lens.runs.housekeeping import check_deletable, delete_run, measure_size

        found = _find_runs(runs, options)
        if not found:
            raise ConfigurationError("delete takes one run or more, given none.")
        for run in found:
            check_deletable(run.folder)
        sizes = [measure_size(run.folder) for run in found]
        show_doomed(screen.console, found, sizes)
        if not (yes or _confirm_deletion(screen, len(found))):
            screen.console.print("nothing deleted")
            found, sizes = [], []
        for run in found:
            delete_run(run.folder)
            screen.print_line(f"deleted {run.folder.root}")
        screen.print_result({"deleted": [str(run.folder.root) for run in found], "bytes": sum(sizes)})


def _confirm_deletion(screen: Screen, count: int) -> bool:
    if not sys.stdin.isatty():
        raise ConfigurationError("delete asks first, and there is no terminal to ask on; give --yes to delete unasked.")
    what = "this run" if count == 1 else f"these {count} runs"
    return typer.confirm(f"delete {what} for good?", err=screen.as_json)
