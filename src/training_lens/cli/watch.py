"""`training-lens watch`: a run's live numbers in a terminal, or as lines for a log."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import Screen, command, load_config, refuse_unused
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from rich.console import Console

    from training_lens.runs.run_folder import RunFolder
    from training_lens.ui.layer_reader import LayerReader
    from training_lens.ui.run_state import RunReader, RunState

LOGGED_LINES = 40  # of a frame that no terminal shows
REFRESH_SECONDS = 1.0  # between two frames, or two looks for news

RunName = Annotated[
    str, typer.Argument(metavar="[RUN]", help="A run's id or folder, an experiment (its last run), or 'latest'.")
]
Once = Annotated[bool, typer.Option("--once", help="Print how the run is now, and leave.")]
Layers = Annotated[
    bool, typer.Option("--layers/--no-layers", help="Show the layers, for which torch is loaded: seconds, and 400 MB.")
]


def watch(run: RunName = "latest", *, once: Once = False, layers: Layers = True, options: CommandOptions) -> None:
    """Show a run in the terminal while it trains: progress, losses, findings, answers, layers. q or Ctrl+C ends it.

    It reads the run's folder, so it can neither stop nor slow the run. Where no terminal is, it prints a line for each
    validation, finding and change of status, until the run ends.

    Examples: training-lens watch; training-lens watch RUN --once; training-lens watch RUN >> watch.log
    """
    with command(options) as screen:
        name, options = options.split_argument(run)
        folder = _find_run(name or "latest", options)
        from training_lens.ui.layer_reader import LayerReader
        from training_lens.ui.run_state import RunReader

        reader, layer_reader = RunReader(folder), LayerReader(folder, is_on=layers)
        state: RunState | None = None
        if once:
            state = _show_once(screen.console, reader, layer_reader)
        else:
            is_live = screen.console.is_terminal and not screen.console.is_dumb_terminal
            with suppress(KeyboardInterrupt):  # a way to end it, as q is
                state = _show_live(screen, reader, layer_reader) if is_live else _print_news(screen, reader)
        if screen.as_json:
            state = state if state and state.is_over else reader.read_state(with_verdict=True)
            screen.print_result(state.as_json())
        layer_reader.wait_for_thread()


def _find_run(name: str, options: CommandOptions) -> RunFolder:
    from training_lens.config.run_config import NOT_OURS
    from training_lens.runs.run_lookup import find_run
    from training_lens.utils.names import require_contained

    refuse_unused(options.words, ("output.",), "watch looks at a run, and trains none.")
    output = load_config(options).output
    run = find_run(name, output.base_output_dir, output.named_experiment)
    require_contained(run.root, besides=NOT_OURS)
    return run


def _show_once(console: Console, reader: RunReader, layers: LayerReader) -> RunState:
    """Print one frame."""
    state = reader.read_state(with_verdict=True)
    _print_frame(console, state, layers)
    return state


def _print_frame(console: Console, state: RunState, layers: LayerReader) -> None:
    """Print the run's state below what the screen shows already."""
    from training_lens.ui.terminal_view import fits_layers, render_frame

    size = console.size
    last = layers.read_last_map() if fits_layers(size) else None
    lines = size.height - 1 if console.is_terminal else LOGGED_LINES  # a prompt follows it
    for line in render_frame(console, state, last, lines):
        line.rstrip()
        console.print(line, no_wrap=True, soft_wrap=True)


def _show_live(screen: Screen, reader: RunReader, layers: LayerReader) -> RunState | None:
    """Show the run until it ends, and then its last state; None where the view was left before."""
    from training_lens.ui.terminal_view import TerminalView, fits_layers
    from training_lens.utils.logging import filter_screen

    with filter_screen(lambda _record: False), TerminalView(screen.console) as view:
        while not (state := reader.read_state()).is_over:
            view.show_state(state, layers.refresh_map() if fits_layers(screen.console.size) else None)
            if view.wait_for_quit(REFRESH_SECONDS):
                break
    if state.is_over:
        _print_frame(screen.console, state, layers)
        return state
    screen.print_line(f"the run goes on. To see it again: training-lens watch {state.folder}")
    return None


def _print_news(screen: Screen, reader: RunReader) -> RunState:
    """Print what happens until the run ends, or nobody reads it any more."""
    from training_lens.ui.run_news import list_news
    from training_lens.utils.streams import lost_output

    state: RunState | None = None
    while True:
        before, state = state, reader.read_state()
        for line in list_news(before, state):
            screen.print_line(line)
        if state.is_over or lost_output(sys.stdout):
            return state
        time.sleep(REFRESH_SECONDS)
