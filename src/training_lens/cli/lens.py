"""What `analyze`, `report` and `export` share: which run is meant, and opening it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import load_config, refuse_unused
from training_lens.cli.places import copied_here, locate_run

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


def opened(run: str, overrides: list[str] | None, config: list[str] | None, base: str | None) -> CheckpointAnalyzer:
    """The run's captures, ready to be analysed.

    Raises:
        CheckpointError: there is no such run.
        ConfigurationError: settings that reading does not heed.
    """
    from pathlib import Path

    run, given = _named(run, overrides)
    folder = _located(run, given, config)
    if base:
        _check_base(base)
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer

    return CheckpointAnalyzer(folder, base=Path(base) if base else None)


def _check_base(base: str) -> None:
    """Refuse a folder that is not there or no model; a hub's id may be in its local cache."""
    from training_lens.config.schema import ModelSection
    from training_lens.errors import ConfigurationError, ModelLoadingError
    from training_lens.models.location import locate

    try:
        locate(ModelSection(id=base))
    except ModelLoadingError as error:
        raise ConfigurationError(str(error).replace("model.id", "--base", 1)) from error


def opened_pair(
    run: str, against: str | None, overrides: list[str] | None, config: list[str] | None, base: str | None
) -> tuple[CheckpointAnalyzer, CheckpointAnalyzer | None]:
    """The run, and the one to compare it with where that is asked for; both are looked for in one place."""
    run, given = _named(run, overrides)
    return opened(run, given, config, base), opened(against, given, config, base) if against else None


def _named(run: str, overrides: list[str] | None) -> tuple[str, list[str]]:
    """The run and the settings; a setting that stands in the run's place is one, and the run then the latest."""
    from pathlib import Path

    from training_lens.runs.run_folder import LATEST

    given = list(overrides or [])
    return (LATEST, [run, *given]) if "=" in run and not Path(run).exists() else (run, given)


def _located(run: str, overrides: list[str], config: list[str] | None) -> Path:
    """The folder that the run means; of a path, that path, there or not."""
    from pathlib import Path

    refuse_unused(overrides, ("output.",), WHY)
    output = load_config(config, overrides).output
    run = copied_here(run, output.base_output_dir, finished=None)
    if Path(run).exists() and not (Path(run) / "metadata").is_dir():
        return Path(run)
    return locate_run(run, output, finished=None).root
