"""The `training-lens` command: one file per command. Help imports neither torch nor the config."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from training_lens.cli.options import HELP_OPTIONS, build_command, refuse_wrong_usage
from training_lens.utils.processor_load import OtherPrograms, share_busy_cores
from training_lens.utils.streams import protect_output

COMMANDS = {
    "Data": ("prepare",),
    "Train": ("init", "plan", "validate", "lr", "train", "sweep"),
    "Evaluate": ("evaluate", "baseline", "compare", "knob", "infer"),
    "Look inside": ("ui", "watch", "analyze", "explain", "rank", "report", "export"),
    "Ship": ("combine", "merge", "export-adapter", "serve", "benchmark", "push"),
    "Runs": ("sync", "doctor", "experiment"),
}
PANELS = {name: panel for panel, names in COMMANDS.items() for name in names}
MODULES = {
    "baseline": "evaluate",
    "plan": "plan_devices",
    "rank": "truncate_rank",
    "export-adapter": "export_adapter",
}  # of commands whose file has another name


class CommandGroup(TyperGroup):
    """The commands; each is imported when it is called or listed, since building all takes longer than most errors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: dict[str, Any] = dict.fromkeys(PANELS)
        self._others = OtherPrograms()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with refuse_wrong_usage():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        share_busy_cores(self._others)
        with refuse_wrong_usage():
            return super().invoke(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in PANELS and self.commands[cmd_name] is None:
            module = import_module(f"training_lens.cli.{MODULES.get(cmd_name, cmd_name)}")
            self.commands[cmd_name] = build_command(
                getattr(module, cmd_name.replace("-", "_")), PANELS[cmd_name], cmd_name
            )
        return self.commands.get(cmd_name)


cli = typer.Typer(
    name="training-lens",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from training_lens._version import __version__

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
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for them reads every installed package
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
