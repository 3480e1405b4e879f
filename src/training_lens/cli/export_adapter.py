"""`training-lens export-adapter`: an adapter in the form that another program loads, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_run_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_adapter
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from training_lens.adapter_export.export_run import ExportResult
    from training_lens.config.schema import TrainingConfig


RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run's id or folder, an experiment, 'latest', or an adapter folder."),
]
To = Annotated[
    Literal["peft", "plain", "gguf"],
    typer.Option(
        help="plain: a LoRA of one rank and scale, which any loader reads right; peft: the adapter as PEFT loads it; "
        "gguf: for llama.cpp and Ollama."
    ),
]
Output = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Where it is written; without it, artifacts/exported of the run.")
]
Scale = Annotated[
    float | None,
    typer.Option(
        help="Multiplies the adapter's update; 1 is as trained. Default: the scale chosen with knob --choose, else 1."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what an earlier export wrote, once the new one is checked.")
]
SameBase = Annotated[
    bool, typer.Option("--same-base", help="Take model.id for the base that a bare adapter knows by another name.")
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
    """Write an adapter in the form that another program loads, and check that it computes the same there.

    Examples: training-lens export-adapter RUN --to plain;
    training-lens export-adapter RUN --to gguf --merged --dtype q8_0;
    training-lens export-adapter ADAPTER_FOLDER --to plain model.id=PATH --output FOLDER
    """
    with command(options) as screen:
        named, options = options.split_argument(run)
        settings = _load_config(options, named)
        from training_lens.adapter_export.export_plan import ExportOptions, plan_export

        asked = ExportOptions(**vars(write) | {"output": Path(write.output) if write.output else None})
        plan_export(settings, asked)  # refuses what is in the way before torch is imported
        from training_lens.adapter_export.export_run import export_adapter as export

        screen.console.print("loading base and adapter in float32 ...", style="dim")
        written = "written; reading it back, and letting another program compute with it ..."
        exported = export(settings, asked, lambda _folder: screen.print_line(written, style="dim"))
        _show_exported(screen, exported)
        screen.print_result(exported.report)


def _load_config(options: CommandOptions, run: str | None) -> TrainingConfig:
    """The config, with RUN as the adapter; settings that an export would ignore are refused."""
    from training_lens.runs.run_lookup import uses_own_model

    settings = load_run_config(options, run)
    own = ("model.", "data.") if uses_own_model(settings.inference.adapter) else (*OF_ANY_RUN, "data.validation=")
    used = ("inference.adapter", "output.", *own)
    refuse_unused(options.words, used, "export-adapter takes what the run's own config says.")
    return locate_adapter(settings)


def _show_exported(screen: Screen, exported: ExportResult) -> None:
    report, found = exported.report, exported.verification
    title = f"on {report['rows']} rows {report['rows_from']}" if found else "of the written file, read back"
    title += f": {found.positions} positions, {found.answers} answers" if found else ""
    rows = [(c["name"], f"{c['measured']:.2g}", f"{c['allowed']:.2g}", "ok") for c in report["checks"]]
    numbers = ("measured", "allowed")
    show_table(screen.console, title, ("checked", *numbers, ""), rows, right=numbers)
    if report["not_computed"]:
        screen.print_line(report["not_computed"])
    if not report["base_known"]:
        screen.console.print("nothing says which weights the adapter was trained on: the base was taken by its name")
    screen.print_line(f"the adapter ({report['form']}) is in {exported.output}")
