"""What `analyze`, `report` and `export` share: finding the run and opening its captures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import load_config, refuse_unused
from training_lens.cli.find_runs import fetch_copy, locate_run
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError, ModelLoadingError

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer

RunPlace = Annotated[
    str,
    typer.Argument(
        metavar="[RUN]",
        help="A run's id or folder, an experiment (its last run), 'latest', a place in a mirror "
        "(s3://...), a lens folder, or PEFT checkpoints of another trainer.",
    ),
]
BaseFolder = Annotated[
    str | None, typer.Option("--base", metavar="FOLDER", help="The base's weights, for checkpoints of other trainers.")
]
WHY = "this reads what was captured, and only the place of runs can be set."


def open_analyzers(
    run: str, against: str | None, options: CommandOptions, base: str | None
) -> tuple[CheckpointAnalyzer, CheckpointAnalyzer | None]:
    """The analyzers of a run (the latest, where a setting stands in its place) and of the run to compare it with."""
    run, options = options.split_run(run)
    folders = [_locate_folder(name, options, base) for name in (run, against) if name]
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer

    first, *second = (CheckpointAnalyzer(folder, base=Path(base) if base else None) for folder in folders)
    return first, second[0] if second else None


def _locate_folder(run: str, options: CommandOptions, base: str | None) -> Path:
    """The folder that the run means; a path that is no run's is taken as it is."""
    refuse_unused(options.words, ("output.",), WHY)
    output = load_config(options).output
    run = fetch_copy(run, output.base_output_dir, finished=None)
    is_other = Path(run).exists() and not (Path(run) / "metadata").is_dir()
    folder = Path(run) if is_other else locate_run(run, output, finished=None).root
    if base:
        _check_base(base)
    return folder


def _check_base(base: str) -> None:
    """Refuse a missing folder, or one without a model; a hub id may be in the local cache."""
    from training_lens.config.schema import ModelSection
    from training_lens.models.location import locate_model

    try:
        locate_model(ModelSection(id=base))
    except ModelLoadingError as error:
        raise ConfigurationError(str(error).replace("model.id", "--base", 1)) from error
