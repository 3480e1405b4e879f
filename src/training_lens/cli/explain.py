"""`training-lens explain`: which modules, rows and tokens made the change that an adapter is.

Each of its commands is a function in a file of its own, `cli/explain_NAME.py`, and stands in `COMMANDS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from training_lens.cli.options import build_command

COMMANDS = ("modules", "rows", "answer", "memory")


class ExplainGroup(TyperGroup):
    """The commands of the group; each is imported when it is called or listed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS and self.commands[cmd_name] is None:
            module = import_module(f"training_lens.cli.explain_{cmd_name}")
            self.commands[cmd_name] = build_command(getattr(module, f"explain_{cmd_name}"), "Explain", cmd_name)
        return self.commands.get(cmd_name)


explain = typer.Typer(
    name="explain",
    cls=ExplainGroup,
    help="What made the change that an adapter is: its modules, its rows, and for one answer.",
    no_args_is_help=True,
    add_completion=False,
)


@explain.callback()
def describe_group() -> None:
    """What made the change that an adapter is: its modules, its rows, and for one answer."""
