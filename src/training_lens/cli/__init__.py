"""The `training-lens` command: one file per command. Help imports neither torch nor the config."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from training_lens.cli.analyze import analyze
from training_lens.cli.benchmark import benchmark
from training_lens.cli.compare import compare
from training_lens.cli.doctor import doctor
from training_lens.cli.evaluate import baseline, evaluate
from training_lens.cli.experiment import experiment
from training_lens.cli.export import export
from training_lens.cli.infer import infer
from training_lens.cli.init import init
from training_lens.cli.merge import merge
from training_lens.cli.options import add_command
from training_lens.cli.prepare import prepare
from training_lens.cli.push import push
from training_lens.cli.report import report
from training_lens.cli.sweep import sweep
from training_lens.cli.sync import sync
from training_lens.cli.train import train
from training_lens.cli.validate import validate
from training_lens.utils.streams import protect_output

cli = typer.Typer(
    name="training-lens",
    help="LoRA fine-tuning of causal language models that you can trust and see inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "Data": (prepare,),
    "Train": (init, validate, train, sweep),
    "Evaluate": (evaluate, baseline, compare, infer),
    "Look inside": (analyze, report, export),
    "Ship": (merge, benchmark, push),
    "Runs": (sync, doctor),
}
for panel, commands in COMMANDS.items():
    for command in commands:
        add_command(cli, panel=panel)(command)
cli.add_typer(experiment, rich_help_panel="Runs")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from training_lens import __version__

        print(f"training-lens {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and leave.")
]


@cli.callback()
def describe_command(version: Version = False) -> None:
    """LoRA fine-tuning of causal language models that you can trust and see inside."""


def main() -> None:
    """The command's entry point."""
    protect_output()
    try:
        cli()
    except KeyboardInterrupt:  # before a command has begun; later, the command reports it
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception:  # a bug, or --debug; a traceback may quote a secret
        from training_lens.utils.secrets import redact_text

        print(redact_text(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


__all__ = ["cli", "main"]
