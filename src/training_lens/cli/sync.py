"""`training-lens sync`: send what of a run is not sent yet."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_run
from training_lens.cli.options import CommandOptions
from training_lens.cli.truncate_rank import RunArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from training_lens.integrations.delivery import IntegrationState

Status = Annotated[bool, typer.Option("--status", help="Send nothing: show what is connected, and what is not sent.")]
Again = Annotated[bool, typer.Option("--again", help="Send everything, also what was sent: for a place that lost it.")]


def sync(run: RunArgument = "latest", *, status: Status = False, again: Again = False, options: CommandOptions) -> None:
    """Send what of a run is not sent yet, to every place that its config names; or to others that you name here.

    Examples: training-lens sync; training-lens sync RUN tracking.wandb.mode=online;
    training-lens sync RUN output.mirror=s3://bucket/path
    """
    with command(options) as screen:
        from training_lens.integrations.send_run import read_delivery_states, send_run

        named, options = options.split_argument(run)
        refuse_unused(options.words, ("output.", "tracking."), "sync sends a run as it is.")
        settings = load_config(options)
        folder = locate_run(named or "latest", settings.output, finished=None)
        changes = {"tracking": settings.explicit_values()["tracking"]}
        if settings.output.mirror:
            changes["output"] = {"mirror": settings.output.mirror}
        states = read_delivery_states(folder, changes) if status else send_run(folder, changes, again=again)
        _show_states(screen, states)
        screen.print_result({"run_dir": str(folder.root), "integrations": [asdict(state) for state in states]})
        missing = [state.name for state in states if state.status != "delivered"]
    if missing and not status:
        raise SystemExit(1)


def _show_states(screen: Screen, states: Sequence[IntegrationState]) -> None:
    if not states:
        screen.console.print("this run is connected to nothing; name a place, such as tracking.wandb.mode=online")
        return
    rows = [(state.name, state.status, state.outstanding, state.error) for state in states]
    show_table(screen.console, "", ("where", "state", "not sent", "why"), rows)
