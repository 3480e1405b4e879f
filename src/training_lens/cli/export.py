"""`training-lens export`: captures as files for other tools."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from training_lens.cli.common import command
from training_lens.cli.lens import BaseFolder, RunPlace, open_analyzer
from training_lens.cli.options import CommandOptions


class ExportKind(StrEnum):
    """The kinds of data, as `core.types.DataType`."""

    adapter_weights = "adapter_weights"
    adapter_gradients = "adapter_gradients"
    lora_activations = "lora_activations"
    activations = "activations"
    optimizer_state = "optimizer_state"
    loss = "loss"


class ExportFormat(StrEnum):
    """Of the files."""

    csv = "csv"
    json = "json"
    npz = "npz"
    parquet = "parquet"


KindOption = Annotated[ExportKind, typer.Option("--data-type", help="What is exported.")]
FormatOption = Annotated[
    ExportFormat, typer.Option("--format", help="npz: an array (steps, modules) for each measure; the others: rows.")
]
Output = Annotated[str | None, typer.Option(metavar="FOLDER", help="Where files go; without it, exports/ of the run.")]
Force = Annotated[bool, typer.Option("--force", help="Write over files of an earlier export.")]


def export(
    data_type: KindOption,
    run: RunPlace = "latest",
    *,
    format: FormatOption = ExportFormat.csv,
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
        from pathlib import Path

        analyzer = open_analyzer(run, options, base)
        from training_lens.analysis.exporting import export_tables
        from training_lens.core.types import DataType

        recording = analyzer.recording
        folder = Path(output) if output else recording.folder / "exports"
        files = export_tables(recording, DataType(data_type.value), format.value, folder, force=force)
        for file, rows in files.items():
            screen.print_line(f"{rows:,} rows in {file}")
        screen.print_result({"files": {str(file): rows for file, rows in files.items()}})
