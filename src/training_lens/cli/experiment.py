"""`training-lens experiment`: the runs that there are; which is best, how they differ, tags, deletion."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_lens.cli.common import ConfigFile, Debug, Json, Screen, command, load_config, refuse_unused
from training_lens.cli.options import add_command

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

experiment = typer.Typer(
    name="experiment",
    help="The runs that there are: list, show, compare, best, tag, delete.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _base(config: list[str] | None, overrides: list[str] | None) -> str:
    """Where the runs are."""
    refuse_unused(overrides, BASE, "experiment looks at runs, and trains none.")
    return load_config(config, overrides).output.base_output_dir


def _apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Names and settings, which stand in one list of arguments."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def _found(words: list[str], config: list[str] | None) -> list[RunOverview]:
    """The runs that the arguments name."""
    from training_lens.runs.run_listing import find_runs

    names, settings = _apart(words)
    return find_runs(names, _base(config, settings))


@add_command(experiment, "list")
def list_(
    overrides: Settings = None,
    sort: Sort = None,
    status: Status = None,
    tag: WithTag = None,
    name: Name = None,
    mirror: Mirror = None,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A table of the runs: what became of each, its steps and loss, and its tags; of those here, or of a mirror."""
    with command(json, debug) as screen, ExitStack() as opened:
        from training_lens.cli.run_tables import show_runs, warn_of_other_rows
        from training_lens.runs.run_listing import read_runs, sort_runs

        base = mirror or _base(config, overrides)
        known = opened.enter_context(_runs_of_mirror(mirror, name)) if mirror else read_runs(base, name)
        runs = [run for run in known if status in (None, run.status) and (tag is None or tag in run.tags)]
        runs = sort_runs(runs, sort) if sort and runs else runs
        if runs:
            show_runs(screen.console, runs, sort or METRIC)
            if sort:
                warn_of_other_rows(screen.console, runs, sort)
        else:
            screen.console.print(f"no such runs in {base}", markup=False, soft_wrap=True)
        screen.result({"base": base, "runs": [run.as_json() for run in runs]})


@contextmanager
def _runs_of_mirror(place: str, name: str | None) -> Iterator[list[RunOverview]]:
    """The runs of a mirror, the newest first; within the block their small files are here."""
    import tempfile
    from pathlib import Path

    from training_lens.integrations.fsspec_storage import open_storage
    from training_lens.integrations.remote_run import read_remote_runs

    with tempfile.TemporaryDirectory() as cache:
        yield read_remote_runs(open_storage(place), name, Path(cache))


@add_command(experiment)
def show(
    run: RunName,
    overrides: Settings = None,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """One run: its numbers, the settings that are not the defaults, its data, its losses on the way, its reports."""
    with command(json, debug) as screen:
        from training_lens.cli.run_tables import details, show_details
        from training_lens.runs.run_listing import find_runs

        (found,) = find_runs([run], _base(config, overrides))
        told = details(found)
        show_details(screen.console, found, told)
        screen.result({**found.as_json(), **told})


@add_command(experiment)
def compare(runs: RunNames, config: ConfigFile = None, json: Json = False, debug: Debug = False) -> None:
    """Metrics of some runs side by side, and the settings in which they differ."""
    with command(json, debug) as screen:
        from training_lens.cli.run_tables import show_comparison
        from training_lens.errors import ConfigurationError
        from training_lens.runs.run_listing import config_differences

        found = _found(runs, config)
        if len(found) < 2:
            raise ConfigurationError(f"compare takes two runs or more, given {len(found)}.")
        differing = config_differences(found)
        show_comparison(screen.console, found, differing)
        screen.result({"runs": [run.as_json() for run in found], "config": differing})


@add_command(experiment)
def best(
    overrides: Settings = None,
    metric: Metric = METRIC,
    highest: Most = None,
    name: Name = None,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The finished run with the best value of a metric."""
    with command(json, debug) as screen:
        from training_lens.cli.run_tables import warn_of_other_rows
        from training_lens.runs.run_listing import best_run, read_runs

        runs = [run for run in read_runs(_base(config, overrides), name) if run.status == "finished"]
        found = best_run(runs, metric, None if highest is None else not highest)
        value = found.metrics[metric]
        screen.console.print(f"{found.run_id}  {metric} {value:.6g}", markup=False, soft_wrap=True)
        screen.console.print(f"  in {found.folder.root}", markup=False, soft_wrap=True)
        differ = warn_of_other_rows(screen.console, runs, metric)
        screen.result({"metric": metric, "value": value, "same_validation": not differ, "run": found.as_json()})


@add_command(experiment)
def tag(
    run: RunName,
    tags: Tags,
    remove: Remove = False,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Put tags on a run, or take them away; `list --tag` finds it by them."""
    with command(json, debug) as screen:
        from training_lens.runs.housekeeping import change_tags

        words, settings = _apart(tags)
        (found,) = _found([run, *settings], config)
        kept = change_tags(found.folder, words, remove=remove)
        screen.console.print(f"{found.run_id}: {', '.join(kept) or 'no tags'}", markup=False, soft_wrap=True)
        screen.result({"run": found.run_id, "path": str(found.folder.root), "tags": list(kept)})


@add_command(experiment)
def delete(
    runs: RunNames, yes: Yes = False, config: ConfigFile = None, json: Json = False, debug: Debug = False
) -> None:
    """Delete runs with everything in their folders: says what goes, and asks first."""
    with command(json, debug) as screen:
        from training_lens.cli.run_tables import show_doomed
        from training_lens.errors import ConfigurationError
        from training_lens.runs.housekeeping import check_deletable, delete_run, measure_size

        found = _found(runs, config)
        if not found:
            raise ConfigurationError("delete takes one run or more, given none.")
        for run in found:
            check_deletable(run.folder)
        sizes = [measure_size(run.folder) for run in found]
        show_doomed(screen.console, found, sizes)
        if not (yes or _agreed(screen, len(found))):
            screen.console.print("nothing deleted")
            found, sizes = [], []
        for run in found:
            delete_run(run.folder)
            screen.console.print(f"deleted {run.folder.root}", markup=False, soft_wrap=True)
        screen.result({"deleted": [str(run.folder.root) for run in found], "bytes": sum(sizes)})


def _agreed(screen: Screen, count: int) -> bool:
    from training_lens.errors import ConfigurationError

    if not sys.stdin.isatty():
        raise ConfigurationError("delete asks first, and there is no terminal to ask on; give --yes to delete unasked.")
    what = "this run" if count == 1 else f"these {count} runs"
    return typer.confirm(f"delete {what} for good?", err=screen.as_json)
