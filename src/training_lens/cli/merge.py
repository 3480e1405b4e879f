"""`training-lens merge`: an adapter as plain weights, checked before it is called done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_run_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_adapter
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.merging.merge_run import MergeResult


Run = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="Short for inference.adapter=RUN: a run's id or folder, an experiment, 'latest', or an adapter folder.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="Where it is written; without it, artifacts/merged or artifacts/delta of the run."
    ),
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Number type of the written weights; auto: that of the base's files."),
]
Scale = Annotated[
    float | None,
    typer.Option(
        help="Multiplies the adapter's update; 1 is as trained. Default: the scale chosen with knob --choose, else 1."
    ),
]
Delta = Annotated[bool, typer.Option("--delta", help="Write the differences of the changed weights alone.")]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of a file of weights.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what an earlier merge wrote, once the new one is checked.")
]
SameBase = Annotated[
    bool, typer.Option("--same-base", help="Take model.id for the base that a bare adapter knows by another name.")
]
BASE_UNKNOWN = "nothing says which weights the adapter was trained on: the base was taken by its name"


@dataclass(frozen=True)
class WriteOptions:
    """What is written, and where: see `MergeOptions`."""

    output: Output = None
    dtype: Dtype = "auto"
    scale: Scale = None
    delta: Delta = False
    max_shard_size: ShardSize = "5GB"
    force: Force = False
    same_base: SameBase = False


def merge(run: Run = None, *, write: WriteOptions, options: CommandOptions) -> None:
    """Merge an adapter into its base, and check in a fresh process that the result computes what the adapter does.

    Examples: training-lens merge; training-lens merge --run RUN --dtype bf16 --output FOLDER;
    training-lens merge --run ADAPTER_FOLDER model.id=PATH --output FOLDER
    """
    with command(options) as screen:
        settings = load_merge_config(options, run, "merge")
        from training_lens.merging.merge_plan import MergeOptions, plan_merge

        asked = MergeOptions(**vars(write) | {"output": Path(write.output) if write.output else None})
        plan_merge(settings, asked)  # refuses what is in the way before torch is imported
        from training_lens.merging.merge_run import merge_adapter

        screen.console.print("merging in float32 ...", style="dim")
        written = "written; loading it in a fresh process to check it ..."
        merged = merge_adapter(settings, asked, lambda _folder: screen.print_line(written, style="dim"))
        _show_merged(screen, merged)
        screen.print_result(merged.report)


def load_merge_config(options: CommandOptions, run: str | None, command: str) -> TrainingConfig:
    """The config, with a run as the adapter; settings that the command would ignore are refused."""
    from training_lens.runs.run_lookup import uses_own_model

    settings = load_run_config(options, run)
    own = ("model.", "data.") if uses_own_model(settings.inference.adapter) else (*OF_ANY_RUN, "data.validation=")
    used = ("inference.adapter", "output.", *own)
    refuse_unused(options.words, used, f"{command} takes what the run's own config says.")
    return locate_adapter(settings)


def show_checks(screen: Screen, title: str, report: Mapping[str, Any]) -> None:
    """Print a report's checks: what was measured, and how far it may differ."""
    rows = [(check["name"], f"{check['measured']:.2g}", f"{check['allowed']:.2g}", "ok") for check in report["checks"]]
    numbers = ("measured", "allowed")
    show_table(screen.console, title, ("checked", *numbers, ""), rows, right=numbers)


def _show_merged(screen: Screen, merged: MergeResult) -> None:
    report, found = merged.report, merged.verification
    title = f"on {report['rows']} rows {report['rows_from']}: {found.positions} positions, {found.answers} answers"
    show_checks(screen, title, report)
    line = (
        f"max logit difference {found.max_logit_difference:.2g} where logits spread by {found.logit_spread:.2g}; "
        f"{found.greedy_agreement:.0%} of the answers are the same, {found.ties} part at a tie"
    )
    screen.print_line(line)
    if report["dtype"] != "fp32":
        moved = f"rounding to {report['dtype']} moves the logits by {found.distance_share:.2%} of what the adapter does"
        screen.print_line(f"{moved}; --dtype fp32 is exact")
    if not report["base_known"]:
        screen.print_line(BASE_UNKNOWN)
    if report["untied"]:
        screen.console.print("embedding and head were one weight, and are two now: the adapter changes one of them")
    if report["newer_form"] and report["kind"] == "merged":
        screen.print_line(
            "the base's config.json has its rotary embedding in rope_parameters alone, as transformers 5 writes it; "
            "transformers 4 reads base and merged model with another one"
        )
    what = "the difference to the base" if report["kind"] == "delta" else "the merged model"
    screen.print_line(f"{what} ({report['dtype']}) is in {merged.output}")
