"""How the command line is read where typer alone is not enough: `--from`, and settings that were typed as options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from itertools import zip_longest
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Function = Callable[..., None]
Origin = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="TRAINER",
        help="What the config file was written for: hf, llama-factory or axolotl; its keys that change no result here "
        "are set aside.",
    ),
]
origin_of_config: ContextVar[str | None] = ContextVar("origin_of_config", default=None)


def accept_origin(function: Function) -> Function:
    """A command with `--from` behind its `--config`, if it has one; `common.load_config` looks at it."""
    signature = inspect.signature(function, eval_str=True)
    if "config" not in signature.parameters:
        return function

    @wraps(function)
    def run(*, origin: str | None = None, **given: Any) -> None:
        token = origin_of_config.set(origin)
        try:
            function(**given)
        finally:
            origin_of_config.reset(token)

    parameters = list(signature.parameters.values())
    option = inspect.Parameter("origin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Origin)
    place = list(signature.parameters).index("config") + 1
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    parameters.insert(place, option)
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


class SettingsCommand(TyperCommand):
    """A command that says what was meant where a setting was typed as an option: `--training.lr=1e-3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base class does, once no option is a setting with dashes before it."""
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            if word == "--":
                break
            if word.startswith("--") and word.partition("=")[0] not in known and (said := _describe(word, following)):
                print(f"error: {said}", file=sys.stderr)
                raise typer.Exit(2)
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            if said := _find_empty(parameter, ctx.params.get(parameter.name or "")):
                print(f"error: {said}", file=sys.stderr)
                raise typer.Exit(2)
        return rest


def _find_empty(parameter: Any, value: Any) -> str | None:
    """Why an option or an argument is refused that was given without a value; settings and prompts say it themselves.

    An empty name must not mean what a missing one does: `--resume "$RUN"` without that variable would train anew.
    """
    texts = value if isinstance(value, list | tuple) else (value,)
    if parameter.name in ("overrides", "prompt") or not any(isinstance(t, str) and not t.strip() for t in texts):
        return None
    name = parameter.opts[0] if parameter.param_type_name == "option" else (parameter.metavar or parameter.name)
    return f"{name}: given without a value; give one, or leave it out."


def _describe(word: str, following: str) -> str | None:
    """Why an unknown option is refused, where it is one of the settings; None where it is a mistyped option."""
    name = word.removeprefix("--").partition("=")[0]
    if not name.replace("_", "").replace(".", "").isalnum():
        return None
    from training_lens.config.coming_from import find_counterpart
    from training_lens.config.overrides import describe_no_override, takes_value

    if "." not in name and find_counterpart(name) is None:
        return None
    return describe_no_override(word, following if "=" not in word and takes_value(word, following) else "")


def add_command(app: typer.Typer, name: str | None = None) -> Callable[[Function], Function]:
    """A decorator that adds a function to an app as a command which reads the command line so."""

    def add(function: Function) -> Function:
        app.command(name, cls=SettingsCommand)(accept_origin(function))
        return function

    return add
