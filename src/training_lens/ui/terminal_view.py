"""The live view of `training-lens watch`: frames on the terminal's alternate screen, and the keys that end it."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.text import Text

from training_lens.ui.layer_reader import LayerMap
from training_lens.ui.run_state import RunState
from training_lens.ui.terminal import compose_frame, translate_to_ascii

KEY_SECONDS = 0.2  # after which a key or another size of the terminal is noticed
LAYERS_FROM = ConsoleDimensions(50, 20)  # the smallest terminal that shows the layers
QUIT_KEYS = frozenset(b"qQ\x03\x04")  # and Ctrl+C, Ctrl+D
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"  # a terminal may take a character for wider than it is counted here
STOPPED = 143  # exit code after SIGTERM


def fits_layers(size: ConsoleDimensions) -> bool:
    """Whether a terminal has room for the layers."""
    return size.width >= LAYERS_FROM.width and size.height >= LAYERS_FROM.height


def render_frame(console: Console, state: RunState, layers: LayerMap | None, height: int) -> list[Text]:
    """The frame for a console of its width."""
    lines = compose_frame(state, layers, console.size.width, height)
    return translate_to_ascii(lines) if console.options.ascii_only else lines


class TerminalView:
    """Shows frames in its block, on the alternate screen of a terminal, which is restored however the block ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._keyboard: int | None = None  # a descriptor
        self._shown: tuple[ConsoleDimensions, list[Text]] | None = None

    def __enter__(self) -> TerminalView:
        with ExitStack() as stack:
            stack.enter_context(_exit_on_sigterm())
            self._keyboard = stack.enter_context(_read_single_keys())
            live = Live(
                console=self._console,
                screen=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self._live = stack.enter_context(live)
            stack.enter_context(_keep_lines_unwrapped(self._console))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def show_state(self, state: RunState, layers: LayerMap | None) -> None:
        """Draw the frame, unless the terminal shows it already."""
        size = self._console.size
        lines = render_frame(self._console, state, layers, size.height)
        if (size, lines) != self._shown:
            self._shown = (size, lines)
            self._live.update(Group(*lines), refresh=True)

    def wait_for_quit(self, seconds: float) -> bool:
        """Wait, at most until the terminal's size changes; whether a key was typed that ends the view."""
        size, end = self._console.size, time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self._console.size == size:
            if self._is_quit_typed(min(left, KEY_SECONDS)):
                return True
        return False

    def _is_quit_typed(self, seconds: float) -> bool:
        if self._keyboard is None:
            time.sleep(seconds)
            return False
        if not select.select([self._keyboard], [], [], seconds)[0]:
            return False
        try:
            keys = os.read(self._keyboard, 1024)
        except OSError:  # the terminal hung up
            return True
        return not keys or not QUIT_KEYS.isdisjoint(keys)


@contextmanager
def _read_single_keys() -> Iterator[int | None]:
    """In the block, keys come one by one and without echo, and Ctrl+C is a key: no process gets a signal by it.

    Gives the descriptor to read from; None where no keys are typed.
    """
    try:
        import termios
    except ImportError:  # Windows
        yield None
        return
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (OSError, ValueError, termios.error):
        yield None
        return
    single = [*before[:3], before[3] & ~(termios.ICANON | termios.ECHO | termios.ISIG), *before[4:]]
    termios.tcsetattr(number, termios.TCSADRAIN, single)
    try:
        yield number
    finally:
        with suppress(termios.error):
            termios.tcsetattr(number, termios.TCSADRAIN, before)


@contextmanager
def _keep_lines_unwrapped(console: Console) -> Iterator[None]:
    """In the block, a terminal cuts lines that it takes for longer than itself."""
    console.file.write(NO_WRAP)
    try:
        yield
    finally:
        console.file.write(WRAP)
        console.file.flush()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """In the block, SIGTERM ends the process as an exit does, so that the terminal is restored."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(STOPPED)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
