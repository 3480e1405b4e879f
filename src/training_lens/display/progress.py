"""Progress bars for anything that may take over two seconds: on a terminal, or in a notebook, without widgets."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from training_lens.utils.logging import plain_console

SHORT = 1.0  # seconds: shorter tasks leave no output in a notebook
WIDTH = 100  # characters of a line in a notebook
EVERY = 0.25  # seconds between two updates of a notebook
PAGE = '<pre style="line-height: 1.4">{code}</pre>'


def create_bars(
    console: Console | None, *columns: ProgressColumn, transient: bool = False, after: float = 0.0
) -> RichProgress | None:
    """Progress bars for a terminal, `transient` or not, or for a notebook `after` seconds; None for other consoles."""
    if console is not None and console.is_jupyter:
        return NotebookBars(*columns, after=after)
    if console is not None and console.is_terminal:
        return RichProgress(*columns, console=console, transient=transient)
    return None


class Progress:
    """Draws progress bars on a terminal or in a notebook; elsewhere, or without a console, it draws none."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
        """A bar while the block runs. Call the function it yields with the amount done since the last call."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA", markup=False),
            TimeRemainingColumn(),
        )
        drawn = create_bars(self._console, *columns, transient=True, after=SHORT)
        if drawn is None:
            yield lambda _amount: None
            return
        with drawn:
            task = drawn.add_task(f"{title} ({unit})" if unit else title, total=total)
            yield lambda amount: drawn.advance(task, amount)


def notebook_console() -> Console | None:
    """A console that writes below the running cell; None outside of notebooks."""
    console = plain_console()
    return console if console.is_jupyter else None


class NotebookBars(RichProgress):
    """Rich's bars as text and HTML output. Rich itself needs ipywidgets there, and saves nothing in the notebook.

    The last state stays visible. Tasks shorter than `after` seconds leave no output.
    """

    def __init__(self, *columns: str | ProgressColumn, after: float = 0.0) -> None:
        super().__init__(*columns, auto_refresh=False)
        self._handle: Any = None  # IPython's DisplayHandle, after the first output
        self._due = time.monotonic() + after

    def start(self) -> None:
        """Nothing: the first task starts the output."""

    def stop(self) -> None:
        """Show the last state."""
        if self._handle is not None:
            self._draw()

    def refresh(self) -> None:
        """Show changes, at most four times a second."""
        if time.monotonic() >= self._due:
            self._draw()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self.refresh()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.refresh()

    def _draw(self) -> None:
        from IPython.display import display

        page = plain_console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False, color_system=None)
        page.print(self.get_renderable())
        html = page.export_html(inline_styles=True, code_format=PAGE, clear=False)
        shown = {"text/plain": page.export_text().rstrip(), "text/html": html}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
        self._due = time.monotonic() + EVERY
