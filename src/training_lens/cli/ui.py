"""`training-lens ui`: the dashboard in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training_lens.cli.common import command
from training_lens.cli.options import OutputOptions
from training_lens.errors import ConfigurationError

DEFAULT_FOLDER = "outputs"

Folder = Annotated[
    str,
    typer.Argument(metavar="[FOLDER]", help="The folder of all runs (output.base_output_dir), or one run's folder."),
]
Host = Annotated[
    str,
    typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine, the printed address holds a token."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")]
Browser = Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser of this machine.")]


def ui(
    folder: Folder = DEFAULT_FOLDER,
    *,
    host: Host = "127.0.0.1",
    port: Port = 8642,
    open: Browser = False,
    options: OutputOptions,
) -> None:
    """Show the runs in a browser: live while they train, with verdicts, findings, answers and a playground.

    It reads run folders, so it can neither stop nor slow a run. Ctrl+C ends it.

    Examples: training-lens ui; training-lens ui path/to/outputs --port 0 --open
    """
    with command(options) as screen:
        from training_lens.ui.server import serve
        from training_lens.ui.web import Outputs

        outputs, page = _find_outputs(folder)

        def announce(address: str) -> None:
            screen.print_line(f"the dashboard of {outputs} is at {address}{page}")
            screen.print_line("Ctrl+C ends it; runs go on.")
            screen.print_result({"address": address + page, "folder": str(outputs)})
            if open:
                import webbrowser

                webbrowser.open(address + page)

        serve(Outputs(outputs), host, port, announce)


def _find_outputs(folder: str) -> tuple[Path, str]:
    """The folder of all runs that is meant, and the page to begin with."""
    from urllib.parse import quote

    from training_lens.runs.run_folder import RunFolder
    from training_lens.utils.formatting import suggest_path
    from training_lens.utils.names import expand_home

    path = expand_home(folder).absolute()
    if (path / "metadata").is_dir():
        run = RunFolder(path)
        if not run.experiment_name:
            raise ConfigurationError(
                f"{path} is a run outside of a folder of runs. Move it to experiments/NAME/runs/ID."
            )
        return path.parents[3], f"#/run/{quote(run.experiment_name, safe='')}/{quote(run.run_id, safe='')}"
    if path.exists() and not path.is_dir():
        raise ConfigurationError(f"'{folder}' is a file; give the folder of all runs.")
    if not path.is_dir() and folder != DEFAULT_FOLDER:
        raise ConfigurationError(f"no folder '{folder}'.{suggest_path(path)}")
    return path, ""
