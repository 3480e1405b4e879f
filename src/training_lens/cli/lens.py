"""What `analyze`, `report` and `export` share: which run is meant, and opening it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import load_config, refuse_unused

if TYPE_CHECKING:
    from pathlib import Path

    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer

RunPlace = Annotated[
    str,
    typer.Argument(
        metavar="[RUN]",
        help="A run's id or folder, 'latest', a lens folder, or PEFT checkpoints of another trainer.",
    ),
]
BaseFolder = Annotated[
    str | None, typer.Option("--base", metavar="FOLDER", help="The base's weights, for checkpoints of other trainers.")
]
WHY = "this reads what a run captured; settings only say where runs are."


def locate(run: str, overrides: list[str] | None, config: str | None) -> tuple[Path, list[str]]:
    """The folder that RUN means, and the settings: what stands in RUN's place and is a setting counts as one.

    Raises:
        CheckpointError: there is no such run.
        ConfigurationError: settings that reading does not heed.
    """
    from pathlib import Path

    from training_lens.utils.runs import LATEST, find_run

    given = list(overrides or [])
    if "=" in run and not Path(run).exists():
        run, given = LATEST, [run, *given]
    refuse_unused(given, ("output.",), WHY)
    output = load_config(config, given).output
    if run != LATEST and Path(run).is_dir():
        return Path(run), given
    return find_run(run, output.base_output_dir, output.experiment_name, finished=None).root, given


def opened(run: str, overrides: list[str] | None, config: str | None, base: str | None) -> CheckpointAnalyzer:
    """The run's captures, ready to be analysed."""
    from pathlib import Path

    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer

    place, _ = locate(run, overrides, config)
    return CheckpointAnalyzer(place, base=Path(base) if base else None)
