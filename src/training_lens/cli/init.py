"""`training-lens init`: a config file to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training_lens.cli.common import command
from training_lens.cli.interview import Interview
from training_lens.cli.options import OutputOptions
from training_lens.errors import ConfigurationError

File = Annotated[str, typer.Argument(help="The YAML file to write.", metavar="[FILE]")]
Model = Annotated[str | None, typer.Option(metavar="MODEL", help="Sets model.id: a local folder or a hub id.")]
Train = Annotated[str | None, typer.Option(metavar="FILE", help="Sets data.train; the file is looked into.")]
Validation = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Sets data.validation, or a share to hold out of --train; without it, 0.1."),
]
Ask = Annotated[bool, typer.Option("--ask", help="Ask a few questions first; Enter takes what is in brackets.")]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]


def init(
    file: File = "config.yaml",
    model: Model = None,
    train: Train = None,
    validation: Validation = None,
    ask: Ask = False,
    force: Force = False,
    *,
    options: OutputOptions,
) -> None:
    """Write a config file with every key, its description and its default; the main keys are set, the rest commented.

    Examples: training-lens init; training-lens init mine.yaml --train rows.jsonl --model path/to/model;
    training-lens init --ask
    """
    with command(options) as screen:
        path = _check_target(file, force)
        from training_lens.config.skeleton import render_skeleton
        from training_lens.utils.files import write_text

        values = Interview(screen, asking=ask).ask_values(model, train, validation)
        write_text(path, render_skeleton(values, file))
        following = [f"training-lens {name} --config {file}" for name in ("validate", "train")]
        screen.print_line(f"wrote {file}. Next:")
        for line in following:
            screen.print_line(f"  {line}")
        screen.print_result({"file": file, "values": values, "next": following})


def _check_target(file: str, force: bool) -> Path:
    from training_lens.utils.files import resolve_file_path

    if Path(file).suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"{file}: init writes YAML; give a name that ends in .yaml.")
    path = resolve_file_path(file, file)
    if path.exists() and not force:
        raise ConfigurationError(f"{file}: is there already; give another name, or --force to write over it.")
    return path
