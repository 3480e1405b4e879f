"""How commands read the command line: the options that they share, as one value, and settings typed as options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

Function = Callable[..., None]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings, for example training.lr=1e-4 or +experiment=quick_test.",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Your YAML or JSON config file; may be given several times, a later file goes over an earlier one.",
        show_default=False,
    ),
]
Origin = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="TRAINER",
        help="What the config file was written for: hf, llama-factory or axolotl; its keys that change no result here "
        "are set aside.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line; all else goes to standard error.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
LAST = ("json", "debug")  # the parameters that stand last in the help of every command


@dataclass(frozen=True)
class OutputOptions:
    """The options of every command."""

    json: Json = False
    debug: Debug = False


@dataclass(frozen=True)
class ConfigOptions(OutputOptions):
    """The options of a command that reads a config file."""

    config: ConfigFile = None
    origin: Origin = None

    def with_words(self, words: list[str]) -> CommandOptions:
        """The same options with these settings."""
        return CommandOptions(self.json, self.debug, self.config, self.origin, words)


@dataclass(frozen=True)
class CommandOptions(ConfigOptions):
    """The options of a command that reads a config file and settings."""

    overrides: Overrides = None

    @property
    def words(self) -> list[str]:
        """The settings that were typed: `training.lr=1e-4`."""
        return list(self.overrides or [])

    def split_run(self, run: str) -> tuple[str, CommandOptions]:
        """The run, and the options; a setting in its place joins the settings, and the run is the latest."""
        if "=" in run and not Path(run).exists():
            return "latest", self.with_words([run, *self.words])
        return run, self

    def split_argument(self, argument: str | None) -> tuple[str | None, CommandOptions]:
        """An optional argument, and the options; an argument that is a setting joins the settings."""
        if argument and "=" in argument:
            return None, self.with_words([argument, *self.words])
        return argument, self


def expand_options(function: Function) -> Function:
    """A function that typer can read: each parameter that is a dataclass of options becomes its fields.

    The fields stand where the parameter stood, but for `--json` and `--debug`, which stand last.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[parameter.name] = group
            parameters += _list_fields(group)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    parameters.sort(key=lambda parameter: parameter.name in LAST)

    @wraps(function)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        function(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _list_fields(group: Any) -> Iterator[inspect.Parameter]:
    annotations = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default  # empty: must be given
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[field.name]
        )


class SettingsCommand(TyperCommand):
    """A command that says what was meant where a setting was typed as an option: `--training.lr=1e-3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as the base class does, after refusing settings with dashes and empty values."""
        known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            if word == "--":
                break
            if word.startswith("--") and word.partition("=")[0] not in known:
                _refuse_usage(_describe_setting(word, following))
        rest = super().parse_args(ctx, list(self._fill_optional_values(args)))
        for parameter in self.params:
            _refuse_usage(_find_empty(parameter, ctx.params.get(parameter.name or "")))
        return rest

    def _fill_optional_values(self, args: list[str]) -> Iterator[str]:
        """The words, with `open` after an option that may stand without a value: its metavar is `[ONE,OTHER]`."""
        choices = {
            name: set((parameter.metavar or "").strip("[]").split(","))
            for parameter in self.params
            if parameter.param_type_name == "option" and (parameter.metavar or "").startswith("[")
            for name in parameter.opts
        }
        for word, following in zip_longest(args, args[1:]):
            yield word
            is_other = following is None or (
                following.strip() and not set(following.split(",")) <= choices.get(word, set())
            )
            if word in choices and is_other:
                yield "open"


@contextmanager
def refuse_wrong_usage() -> Iterator[None]:
    """Say what typer finds wrong in the words typed as every other error is said: one paragraph, exit code 2."""
    try:
        yield
    except Exception as error:  # typer has brought a copy of click's errors since 0.29
        is_help = type(error).__name__ == "NoArgsIsHelpError"
        if is_help or not hasattr(error, "format_message") or getattr(error, "exit_code", 1) != 2:
            raise
        context = getattr(error, "ctx", None)
        place = context.command_path if context else "training-lens"
        said = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        _refuse_usage(f"{said}{'' if said.endswith('?') else '.'} {place} --help says what can be given.")


def _refuse_usage(problem: str | None) -> None:
    """End the command with exit code 2 if there is a problem."""
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(2)


def _find_empty(parameter: Any, value: Any) -> str | None:
    """Why an option or argument without a value is refused; settings and prompts have checks of their own.

    An empty name must not count as a missing one: `--resume "$RUN"` with an empty variable would start a new run.
    """
    texts = value if isinstance(value, list | tuple) else (value,)
    if parameter.name in ("overrides", "prompt") or not any(isinstance(t, str) and not t.strip() for t in texts):
        return None
    name = parameter.opts[0] if parameter.param_type_name == "option" else (parameter.metavar or parameter.name)
    return f"{name}: given without a value; give one, or leave it out."


def _describe_setting(word: str, following: str) -> str | None:
    """Why an unknown option is refused, if it names a setting; None if it is a mistyped option."""
    name = word.removeprefix("--").partition("=")[0]
    if not name.replace("_", "").replace(".", "").isalnum():
        return None
    from training_lens.config.foreign_keys import find_counterpart
    from training_lens.config.overrides import describe_no_override, takes_value

    if "." not in name and find_counterpart(name) is None:
        return None
    return describe_no_override(word, following if "=" not in word and takes_value(word, following) else "")


def add_command(app: typer.Typer, name: str | None = None, panel: str | None = None) -> Callable[[Function], Function]:
    """A decorator that adds a function to an app as a command, under the heading `panel` of the app's help."""

    def add(function: Function) -> Function:
        app.command(name, cls=SettingsCommand, rich_help_panel=panel)(expand_options(function))
        return function

    return add


def build_command(definition: Function | typer.Typer, panel: str, name: str | None = None) -> Any:
    """The command of a function, or of an app with commands of its own.

    Args:
        panel: its heading in the help.
        name: of the command; None: the function's.
    """
    if isinstance(definition, typer.Typer):
        group: Any = typer.main.get_command(definition)
        group.rich_help_panel = panel
        return group
    app = typer.Typer(add_completion=False)
    add_command(app, name, panel)(definition)
    return typer.main.get_command(app)
