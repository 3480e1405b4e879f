"""What the subcommands share: their options, their output, and how errors end them."""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from training_lens.cli.options import origin_of_config
from training_lens.cli.places import locate_adapter
from training_lens.cli.preflight import check_own_model

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from training_lens.config.schema import TrainingConfig

CONSENT = "model.trust_remote_code="  # lets the code of a run's model run: no run does so by itself
WIDEST = 2000  # characters of a line that a program reads
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
FinishedRun = Annotated[
    str, typer.Option(metavar="RUN", help="A run's id or folder, an experiment (its last run), or 'latest'.")
]
AdapterRun = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="Short for inference.adapter=RUN: a run's id or folder, an experiment (its last run), 'latest', an "
        "adapter folder, or a place in a mirror.",
    ),
]
LONGEST_LINE = 1200  # characters of an error
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line; all else goes to standard error.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


OF_ANY_RUN = ("model.device", "model.accept_changed_base", CONSENT)  # what a run's own config does not decide


@dataclass(frozen=True)
class Screen:
    """Where a command writes: `console` for people, which is standard error with `--json`; `output` for the JSON."""

    console: Console
    as_json: bool
    output: TextIO

    def write(self, text: str) -> None:
        """A piece of streamed text, as it is."""
        self.console.print(text, end="", markup=False, soft_wrap=True)

    def result(self, value: dict[str, Any]) -> None:
        """The one JSON object of `--json`; nothing without it."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False), file=self.output, flush=True)


def print_table(console: Console, table: Table) -> None:
    """Print a table: folded to a terminal's width, and a line a row where a program reads it."""
    if console.is_terminal:
        console.print(table)
        return
    from training_lens.utils.consoles import plain_console

    page = StringIO()
    plain_console(width=WIDEST, file=page, color_system=None).print(table)
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


@contextmanager
def command(as_json: bool = False, debug: bool = False, *, has_log: bool = False) -> Iterator[Screen]:
    """Runs a command's body: sets up the log, and turns expected errors into one paragraph and an exit code.

    Args:
        has_log: what it tells is in its own files, too: a screen that cannot be written is no failure.
    """
    from training_lens.errors import TrainingLensError
    from training_lens.utils.consoles import plain_console
    from training_lens.utils.logging import setup_logging
    from training_lens.utils.resource_errors import describe_shortage

    console = plain_console(stderr=as_json)
    setup_logging(console)
    output = sys.stdout
    aside = redirect_stdout(sys.stderr) if as_json else nullcontext()  # what a library prints is no JSON
    try:
        with aside:
            yield Screen(console, as_json, output)
        if not has_log:
            require_written(output)
    except BaseException as error:
        is_expected = isinstance(error, TrainingLensError | OSError | KeyboardInterrupt) or describe_shortage(error)
        is_of_streams = isinstance(error, OSError) and error.errno in (None, errno.EPIPE)
        if debug or not is_expected or (is_of_streams and not describe_shortage(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # where memory ran out, what they held is needed to say so
        said, code = describe_error(error)
        plain_console(stderr=True).print(said, style="red", soft_wrap=True)
        sys.exit(code)


def require_written(output: TextIO) -> None:
    """Refuse to end well where standard output is lost; a reader who had enough and left is no failure.

    Raises:
        OutputError: the disk under it is full, for one.
    """
    from training_lens.errors import OutputError
    from training_lens.utils.streams import lost_output

    lost = lost_output(output)
    if lost and lost.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that hung up
        raise OutputError(
            f"standard output could not be written ({lost.strerror}), so the output of this command is incomplete. "
            "Send it to a place that has room, and run the command again."
        )


def _shorten(message: str) -> str:
    """The message with its lines cut where they quote whole files; after secrets were struck out."""
    return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in message.split("\n"))


def describe_error(error: BaseException) -> tuple[str, int]:
    """What is printed of an expected error, and the exit code."""
    from training_lens.errors import TrainingLensError
    from training_lens.utils.resource_errors import describe_shortage
    from training_lens.utils.secrets import redact_text

    if isinstance(error, TrainingLensError):
        return f"error: {_shorten(redact_text(str(error)))}", error.exit_code
    if isinstance(error, OSError) and error.errno:
        place = f"{error.filename}: " if error.filename else ""
        advice = "Free some space, or give another output.base_output_dir." if error.errno == errno.ENOSPC else ""
        return f"error: {_shorten(redact_text(place))}{error.strerror}. {advice}", 1
    if shortage := describe_shortage(error):
        return f"error: {shortage}", 1
    return "interrupted.", 130


def device_of(settings: TrainingConfig) -> str | None:
    """The device that the user asked for, or None: then the run's own."""
    return None if settings.model.device == "auto" else settings.model.device


def refuse_unused(overrides: list[str] | None, used: tuple[str, ...], why: str) -> None:
    """Settings that a command would not look at are wrong usage: none is dropped in silence.

    Args:
        used: what the keys of those it looks at begin with; presets (`+experiment=...`) may always be given.
    """
    from training_lens.errors import ConfigurationError

    others = [text for text in overrides or [] if not text.startswith(("+", *used))]
    if others:
        keys = ", ".join(f"{key}*" if key.endswith(".") else key for key in used)
        raise ConfigurationError(f"{', '.join(others)}: {why} It takes {keys}.")


def load_config(
    config_files: list[str] | None, overrides: list[str] | None, flags: dict[str, Any] | None = None
) -> TrainingConfig:
    """The validated config of the command line; `flags` are what a command's own options stand for.

    Raises:
        ConfigurationError: see `compose`; or `--from` names no trainer that is known, or there is no file to read so.
    """
    from training_lens.config.compose import compose

    return compose(config_files, overrides or [], flags, _require_origin(origin_of_config.get(), config_files))


def _require_origin(origin: str | None, config_files: list[str] | None) -> str | None:
    from training_lens.config.origins import ORIGINS
    from training_lens.errors import ConfigurationError
    from training_lens.utils.formatting import nearest_name

    if origin is not None and origin not in ORIGINS:
        close = nearest_name(origin, ORIGINS)
        hint = f" Did you mean {close}?" if close else ""
        raise ConfigurationError(
            f"--from {origin}: no config files of that name are known; give {', '.join(ORIGINS)}.{hint}"
        )
    if origin is not None and not config_files:
        raise ConfigurationError(f"--from {origin} says how --config FILE is read; give --config FILE, too.")
    return origin


def load_adapter_config(
    config_files: list[str] | None, overrides: list[str] | None, run: str | None, used: tuple[str, ...]
) -> TrainingConfig:
    """The config, with `--run` as its adapter; settings that the adapter would not heed are refused.

    Args:
        used: what the keys begin with that the command itself looks at.
    """
    from training_lens.errors import ConfigurationError

    named = [text for text in overrides or [] if text.startswith("inference.adapter=")]
    if run is not None and named:
        raise ConfigurationError(f"--run {run} and {named[0]} both name an adapter; keep one.")
    settings = load_config(config_files, overrides, {"inference": {"adapter": run}} if run is not None else None)
    from training_lens.runs.run_lookup import uses_own_model

    own = ("model.", "data.") if uses_own_model(settings.inference.adapter) else OF_ANY_RUN
    refuse_unused(overrides, (*used, "output.", *own), "a run answers with its own config.")
    settings = locate_adapter(settings)
    check_own_model(settings)
    return settings
