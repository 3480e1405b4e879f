"""`training-lens doctor`: what this machine has for training, and what of a run is damaged."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import Screen, command, load_config, refuse_unused
from training_lens.cli.find_runs import locate_run
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.utils.machine import MachineCheck

RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="A run's id or folder, an experiment (its last run), or 'latest'; none: this machine."
    ),
]
Repair = Annotated[bool, typer.Option("--repair", help="Make anew what is damaged and can be made anew.")]
Accept = Annotated[bool, typer.Option("--accept", help="Take the run's files as they are: record their hashes anew.")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare the base's whole files, not samples of them.")]


def doctor(
    run: RunName = None,
    *,
    repair: Repair = False,
    accept: Accept = False,
    verify: Verify = False,
    options: CommandOptions,
) -> None:
    """Look through this machine, or all files of a run: what is damaged, what can be resumed, how it is repaired.

    Exit code 1 where something is damaged.

    Examples: training-lens doctor; training-lens doctor latest; training-lens doctor RUN --repair
    """
    with command(options) as screen:
        run, options = options.split_argument(run)
        refuse_unused(options.words, ("output.",), "doctor looks at what is there.")
        if run is None and (repair or accept or verify):
            raise ConfigurationError("--repair, --accept and --verify are about a run; name one.")
        settings = load_config(options)
        if run is None:
            from training_lens.utils.machine import check_machine

            found = check_machine(settings.output.base_output_dir)
        else:
            folder = locate_run(run, settings.output, finished=None)
            folder.require_free()
            from training_lens.training.run_check import check_run
            from training_lens.training.run_repair import accept_run

            if accept:
                accept_run(folder)
            found = check_run(folder, verify=verify, repair=repair)
        checks = []
        for check in found:
            _show_check(screen, check)
            checks.append(check)
        is_well = all(check.ok for check in checks)
        place = str(folder.root) if run is not None else None
        screen.print_result({"run": place, "ok": is_well, "checks": [asdict(check) for check in checks]})
        if not is_well:
            raise typer.Exit(1)


def _show_check(screen: Screen, check: MachineCheck) -> None:
    mark, style = ("ok", "green") if check.ok else ("no", "red")
    screen.console.print(f"{mark}  {check.name:<18}", style=style, markup=False, end="")
    screen.print_line(" ".join(filter(None, (check.found, check.remedy))))
