"""`training-lens export-adapter`: write an adapter in the form that another program loads, and check it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_lens.cli.common import Screen, command
from training_lens.cli.merge import BASE_UNKNOWN, SameBase, Scale, load_merge_config, show_checks
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from training_lens.adapter_export.export_run import ExportResult


RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run's id or folder, an experiment, 'latest', or an adapter folder."),
]
To = Annotated[
    Literal["peft", "plain", "gguf", "mlx"],
    typer.Option(
        help="plain: a LoRA of one rank and scale, as any loader reads it; peft: the adapter as PEFT loads it; "
        "gguf: for llama.cpp and Ollama; mlx: for mlx-lm."
    ),
]
Output = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Where it is written; without it, artifacts/exported of the run.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what an earlier export wrote, once the new one is checked.")
]
Merged = Annotated[bool, typer.Option("--merged", help="gguf: write the whole model, with the update in its weights.")]
Dtype = Annotated[
    Literal["auto", "f32", "f16", "bf16", "q8_0"],
    typer.Option(help="gguf, merged: how weights are stored; auto: as in the base's files."),
]


@dataclass(frozen=True)
class ExportFlags:
    """What is written, and where: see `ExportOptions`."""

    to: To
    output: Output = None
    scale: Scale = None
    force: Force = False
    same_base: SameBase = False
    merged: Merged = False
    dtype: Dtype = "auto"


def export_adapter(run: RunArgument = None, *, write: ExportFlags, options: CommandOptions) -> None:
    """Write an adapter in the form that another program loads, and check what was written.

    Examples: training-lens export-adapter RUN --to plain;
    training-lens export-adapter RUN --to gguf --merged --dtype q8_0;
    training-lens export-adapter ADAPTER_FOLDER --to plain model.id=PATH --output FOLDER
    """
    with command(options) as screen:
        named, options = options.split_argument(run)
        settings = load_merge_config(options, named, "export-adapter")
        from training_lens.adapter_export.export_plan import ExportOptions, plan_export

        asked = ExportOptions(**vars(write) | {"output": Path(write.output) if write.output else None})
        plan_export(settings, asked)  # refuses what is in the way before torch is imported
        from training_lens.adapter_export.export_run import export_adapter as export

        screen.console.print("loading base and adapter in float32 ...", style="dim")
        written = "written; reading it back, and comparing answers where a program that loads it is installed ..."
        exported = export(settings, asked, lambda _folder: screen.print_line(written, style="dim"))
        _show_exported(screen, exported)
        screen.print_result(exported.report)


def _show_exported(screen: Screen, exported: ExportResult) -> None:
    report, found = exported.report, exported.verification
    title = f"on {report['rows']} rows {report['rows_from']}" if found else "of the written file, read back"
    title += f": {found.positions} positions, {found.answers} answers" if found else ""
    show_checks(screen, title, report)
    if not report["answers_compared"]:
        screen.print_line(f"the weights are the adapter's; no answers were compared: {report['not_computed']}")
    if not report["base_known"]:
        screen.print_line(BASE_UNKNOWN)
    screen.print_line(f"the adapter ({report['form']}) is in {exported.output}")
