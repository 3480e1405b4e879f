"""The logger tree `training_lens`: to the screen through rich, and to a run's run.log."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from training_lens.utils.secrets import redact_text

ROOT = "training_lens"


def plain_console(**options: Any) -> Console:
    """A Rich `Console` without markup (pass styles as arguments or `Text`); without a terminal it folds no line."""
    console = Console(**{"highlight": False, "emoji": False, "markup": False, **options})
    console.soft_wrap = not console.is_terminal
    return console


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


class ScreenHandler(logging.Handler):
    """Writes the log to a console, wrapped at words on a terminal and unwrapped elsewhere."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.shown: deque[logging.LogRecord] = deque(maxlen=1000)  # since the last run.log was opened

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            style = "yellow" if record.levelno >= logging.WARNING else ""
            self.shown.append(record)
            self._console.print(text, style=style, markup=False, soft_wrap=not self._console.is_terminal)
        except (OSError, ValueError):  # the screen was closed
            pass
        except Exception:
            self.handleError(record)


class RunLogHandler(logging.FileHandler):
    """Writes run.log. Lines that cannot be written are dropped; the first one is reported to the other handlers."""

    lost = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError | ValueError):
            super().handleError(record)
        elif not self.lost:
            self.lost = True
            get_logger(__name__).warning("%s lacks lines (%s); the run continues", self.baseFilename, error)

    def close(self) -> None:
        with suppress(OSError):  # buffered lines that cannot be written are lost
            super().close()


def setup_logging(console: Console | None = None, level: int = logging.INFO) -> logging.Logger:
    """Send the log to `console`, else standard error, and silence libraries: no progress bars, telemetry or hints.

    A second call replaces the first. Returns the root of our loggers.
    """
    logger = logging.getLogger(ROOT)
    for old in _screen_handlers():
        logger.removeHandler(old)
    handler = ScreenHandler(console or plain_console(stderr=True))
    handler.setFormatter(_RedactingFormatter("%(message)s"))
    handler.setLevel(level)
    logger.addHandler(handler)
    logger.setLevel(min(level, logging.INFO))
    logger.propagate = False
    quiet_libraries()
    return logger


def _screen_handlers() -> list[ScreenHandler]:
    return [handler for handler in logging.getLogger(ROOT).handlers if isinstance(handler, ScreenHandler)]


@contextmanager
def hide_screen_notes() -> Iterator[None]:
    """Within the block, screens show only errors: planning a recorded run again would repeat the notes of that run."""
    levels = {handler: handler.level for handler in _screen_handlers()}
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """In the block, transformers draws no progress bars."""
    from transformers.utils import logging as library

    drew = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if drew:
            library.enable_progress_bar()


def quiet_libraries() -> None:
    """Set environment variables that libraries read at import; call before importing torch and transformers."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer's number type
    # PEFT uses an old name of a transformers property; users cannot change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class _RedactingFormatter(logging.Formatter):
    """A formatter that redacts secrets in messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


class RepeatFilter:
    """Passes every message once."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._shown
        self._shown.add(message)
        return new


@contextmanager
def filter_screen(passes: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """In the block, the screen shows what `passes`; run.log still gets everything."""
    handlers = _screen_handlers()
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def quiet_screen() -> AbstractContextManager[None]:
    """In the block, the screen shows only warnings and errors; run.log still gets everything."""
    return filter_screen(lambda record: record.levelno >= logging.WARNING)


class TrainingLogger:
    """In the block, the log also goes to the run's run.log, with UTC times.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with TrainingLogger(folder / "run.log"):
        ...     get_logger("example").info("a line")
        >>> "a line" in (folder / "run.log").read_text()
        True
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)

    def __enter__(self) -> TrainingLogger:
        self._handler = RunLogHandler(self._path, encoding="utf-8")
        formatter = _RedactingFormatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self._handler.setFormatter(formatter)
        logger = logging.getLogger(ROOT)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self._handler)
        for screen in _screen_handlers():  # messages from before the run had a folder
            while screen.shown:
                self._handler.handle(screen.shown.popleft())
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(ROOT).removeHandler(self._handler)
        self._handler.close()
