"""`training-lens export`: captures as files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from training_lens.cli.common import command
from training_lens.cli.lens import BaseFolder, RunPlace, open_analyzers
from training_lens.cli.options import CommandOptions

Kind = Annotated[  # of `core.types.DataType`
    Literal["adapter_weights", "adapter_gradients", "lora_activations", "activations", "optimizer_state", "loss"],
    typer.Option("--data-type", help="What is exported."),
]
Format = Annotated[
    Literal["csv", "json", "npz", "parquet"],
    typer.Option("--format", help="npz: an array (steps, modules) for each measure; the others: rows."),
]
Output = Annotated[str | None, typer.Option(metavar="FOLDER", help="Where files go; without it, exports/ of the run.")]
Force = Annotated[bool, typer.Option("--force", help="Write over files of an earlier export.")]


def export(
    data_type: Kind,
    run: RunPlace = "latest",
    *,
    format: Format = "csv",
    base: BaseFolder = None,
    output: Output = None,
    force: Force = False,
    options: CommandOptions,
) -> None:
    """Write captures as files: a file for each table of that kind, with a row for each step and module.

    Examples: training-lens export RUN --data-type adapter_gradients --format parquet;
    training-lens export path/to/trainer_output --data-type adapter_weights --format csv
    """
    with command(options) as screen:
        analyzer, _ = open_analyzers(run, None, options, base)
        from training_lens.analysis.exporting import export_tables
        from training_lens.core.types import DataType

        recording = analyzer.recording
        folder = Path(output) if output else recording.folder / "exports"
        files = export_tables(recording, DataType(data_type), format, folder, force=force)
        for file, rows in files.items():
            screen.print_line(f"{rows:,} rows in {file}")
        screen.print_result({"files": {str(file): rows for file, rows in files.items()}})
