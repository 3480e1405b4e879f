"""What the commands share: reading the config, output, and how an error ends a command."""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from training_lens.cli.find_runs import locate_adapter
from training_lens.cli.missing_files import check_own_model
from training_lens.cli.options import CommandOptions, ConfigOptions, OutputOptions
from training_lens.errors import ConfigurationError, OutputError, ProcessLostError, TrainingLensError
from training_lens.utils.files import replace_non_finite
from training_lens.utils.formatting import reveal_controls
from training_lens.utils.launch import launched_rank
from training_lens.utils.resource_errors import describe_shortage
from training_lens.utils.streams import lost_output

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig

CONSENT = "model.trust_remote_code="  # allows the code of a run's model, which no run allows by itself
WIDEST = 2000  # characters of a table's line, where a program reads it
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
OF_ANY_RUN = ("model.device", "model.accept_changed_base", CONSENT)  # settings that a run's own config does not decide


@dataclass(frozen=True)
class Screen:
    """Where a command writes: `console` for people, which is standard error with `--json`; `output` for the JSON."""

    console: Console
    as_json: bool
    output: TextIO

    def print_line(self, text: str, style: str | None = None) -> None:
        """Print a line as it is: no markup, control characters as pictures, and folded by the terminal alone."""
        self.console.print(reveal_controls(text), style=style, markup=False, soft_wrap=True)

    def write_text(self, text: str) -> None:
        """Print a piece of streamed text as it is."""
        self.console.print(text, end="", markup=False, soft_wrap=True)

    def print_result(self, value: dict[str, Any]) -> None:
        """Print the one JSON object of `--json`; nothing without it."""
        if self.as_json:
            print(json.dumps(replace_non_finite(value), ensure_ascii=False), file=self.output, flush=True)


def show_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Collection[str] = (),
    **style: Any,
) -> None:
    """Print rows of text under their columns; those in `right` are right-aligned. `style` is of Rich's `Table`."""
    table = Table(title=title or None, title_justify="left", **style)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(reveal_controls(cell)) for cell in row))
    print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """Print a table: folded to a terminal's width; where a program reads it, a line for each row, without a frame."""
    if console.is_terminal:
        console.print(table)
        return
    from training_lens.utils.logging import plain_console

    table.box, table.pad_edge = None, False  # or a long cell would make every line as long
    page = StringIO()
    plain_console(width=WIDEST, file=page, color_system=None).print(table)
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


@contextmanager
def command(options: OutputOptions, *, has_log: bool = False) -> Iterator[Screen]:
    """Run a command's body: set up the log, and turn an expected error into one paragraph and an exit code.

    A command that `has_log` writes its results to files as well: a screen that cannot be written is no failure.
    """
    from training_lens.utils.logging import plain_console, setup_logging

    is_main = launched_rank() == 0
    console = plain_console(stderr=options.json, quiet=not is_main)
    setup_logging(console)
    output = sys.stdout
    aside = redirect_stdout(sys.stderr) if options.json else nullcontext()  # libraries print, too
    try:
        with aside:
            yield Screen(console, options.json and is_main, output)
        if not has_log:
            require_written(output)
    except BaseException as error:
        is_expected = isinstance(error, TrainingLensError | OSError | KeyboardInterrupt) or describe_shortage(error)
        is_of_streams = isinstance(error, OSError) and error.errno in (None, errno.EPIPE)
        if options.debug or not is_expected or (is_of_streams and not describe_shortage(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # frees memory, which the report of its lack needs
        message, code = describe_error(error)
        if is_main or not isinstance(error, ProcessLostError):
            plain_console(stderr=True).print(message, style="red", soft_wrap=True)
        sys.exit(code)


def require_written(output: TextIO) -> None:
    """Raise an `OutputError` if standard output was not written, as on a full disk; a closed pipe is no failure."""
    lost = lost_output(output)
    if lost and lost.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that hung up
        raise OutputError(
            f"standard output could not be written ({lost.strerror}), so the output of this command is incomplete. "
            "Send it to a place that has room, and run the command again."
        )


def _shorten_lines(message: str) -> str:
    """The message with long lines cut; secrets must be redacted before."""
    return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in message.split("\n"))


def describe_error(error: BaseException) -> tuple[str, int]:
    """The message of an expected error, and the exit code."""
    from training_lens.utils.secrets import redact_text

    if isinstance(error, TrainingLensError):
        return f"error: {_shorten_lines(redact_text(str(error)))}", error.exit_code
    if isinstance(error, OSError) and error.errno:
        place = f"{error.filename}: " if error.filename else ""
        advice = "Free some space, or give another output.base_output_dir." if error.errno == errno.ENOSPC else ""
        return f"error: {_shorten_lines(redact_text(place))}{error.strerror}. {advice}", 1
    if shortage := describe_shortage(error):
        return f"error: {shortage}", 1
    return "interrupted.", 130


def refuse_unused(overrides: list[str] | None, used: tuple[str, ...], why: str) -> None:
    """Refuse settings that the command would ignore.

    Args:
        used: prefixes of the keys that it uses; presets (`+experiment=...`) are always allowed.
        why: the reason, for the message.
    """
    others = [text for text in overrides or [] if not text.startswith(("+", *used))]
    if stray := [text for text in others if "=" not in text]:
        from training_lens.config.overrides import describe_no_override

        raise ConfigurationError(describe_no_override(stray[0]))
    if others:
        keys = ", ".join(f"{key}*" if key.endswith(".") else key.rstrip("=") for key in used)
        raise ConfigurationError(f"{', '.join(others)}: {why} It takes {keys}.")


def load_config(options: CommandOptions, flags: dict[str, Any] | None = None) -> TrainingConfig:
    """The validated config of the command line; `flags` are the settings that a command's own options stand for.

    Raises:
        ConfigurationError: see `compose`; or `--from` names an unknown trainer, or is given without `--config`.
    """
    from training_lens.config.compose import compose

    _check_origin(options)
    return compose(options.config, options.words, flags, options.origin)


def _check_origin(options: ConfigOptions) -> None:
    from training_lens.config.ignored_keys import ORIGINS
    from training_lens.utils.formatting import did_you_mean

    origin = options.origin
    if origin is not None and origin not in ORIGINS:
        hint = did_you_mean(origin, ORIGINS)
        raise ConfigurationError(
            f"--from {origin}: no config files of that name are known; give {', '.join(ORIGINS)}.{hint}"
        )
    if origin is not None and not options.config:
        raise ConfigurationError(f"--from {origin} says how --config FILE is read; give --config FILE, too.")


def load_run_config(options: CommandOptions, run: str | None) -> TrainingConfig:
    """The config, with `--run` as its `inference.adapter`; refused if a setting names an adapter, too."""
    if run is None:
        return load_config(options)
    if twice := next((word for word in options.words if word.startswith("inference.adapter=")), None):
        raise ConfigurationError(f"'{run}' and {twice} both name an adapter; keep one.")
    return load_config(options, {"inference": {"adapter": run}})


def load_adapter_config(options: CommandOptions, run: str | None, used: tuple[str, ...]) -> TrainingConfig:
    """The config, with `--run` as its adapter; settings that neither the adapter nor the command uses are refused."""
    from training_lens.runs.run_lookup import uses_own_model

    settings = load_run_config(options, run)
    own = ("model.", "data.") if uses_own_model(settings.inference.adapter) else OF_ANY_RUN
    refuse_unused(options.words, (*used, "output.", *own), "a run answers with its own config.")
    settings = locate_adapter(settings)
    check_own_model(settings)
    return settings
