"""What `analyze`, `report` and `export` share: finding the run and opening its captures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import load_config, refuse_unused
from training_lens.cli.find_runs import fetch_copy, locate_run
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from pathlib import Path

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


def open_analyzer(run: str, options: CommandOptions, base: str | None) -> CheckpointAnalyzer:
    """The analyzer of a run's captures.

    Raises:
        CheckpointError: there is no such run.
        ConfigurationError: a setting that reading captures ignores.
    """
    from pathlib import Path

    run, options = _split_run(run, options)
    folder = _locate_folder(run, options)
    if base:
        _check_base(base)
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer

    return CheckpointAnalyzer(folder, base=Path(base) if base else None)


def _check_base(base: str) -> None:
    """Refuse a missing folder, or one without a model; a hub id may be in the local cache."""
    from training_lens.config.schema import ModelSection
    from training_lens.errors import ConfigurationError, ModelLoadingError
    from training_lens.models.location import locate_model

    try:
        locate_model(ModelSection(id=base))
    except ModelLoadingError as error:
        raise ConfigurationError(str(error).replace("model.id", "--base", 1)) from error


def open_analyzers(
    run: str, against: str | None, options: CommandOptions, base: str | None
) -> tuple[CheckpointAnalyzer, CheckpointAnalyzer | None]:
    """The analyzers of a run and of the run to compare it with, if any."""
    run, options = _split_run(run, options)
    return open_analyzer(run, options, base), open_analyzer(against, options, base) if against else None


def _split_run(run: str, options: CommandOptions) -> tuple[str, CommandOptions]:
    """The run and the options; where a setting stands in the run's place, the run is the latest."""
    from pathlib import Path

    from training_lens.runs.run_folder import LATEST

    if "=" not in run or Path(run).exists():
        return run, options
    named, options = options.split_argument(run)
    return named or LATEST, options


def _locate_folder(run: str, options: CommandOptions) -> Path:
    """The folder that the run means; a path that is no run's is taken as it is."""
    from pathlib import Path

    refuse_unused(options.words, ("output.",), WHY)
    output = load_config(options).output
    run = fetch_copy(run, output.base_output_dir, finished=None)
    if Path(run).exists() and not (Path(run) / "metadata").is_dir():
        return Path(run)
    return locate_run(run, output, finished=None).root
