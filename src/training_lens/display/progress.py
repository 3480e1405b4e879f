"""Progress bars for anything that may take over two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from training_lens.display.notebook import NotebookBars

SHORT = 1.0  # seconds: what is over by then leaves nothing in a notebook


def create_bars(
    console: Console | None, *columns: ProgressColumn, transient: bool = False, after: float = 0.0
) -> RichProgress | None:
    """Bars where a person sees them: on a terminal, or below a notebook's cell. None elsewhere.

    Args:
        transient: they vanish at their end; a notebook keeps them.
        after: seconds before they appear in a notebook.
    """
    if console is not None and console.is_jupyter:
        return NotebookBars(*columns, after=after)
    if console is not None and console.is_terminal:
        return RichProgress(*columns, console=console, transient=transient)
    return None


class Progress:
    """Draws bars on a console; on None, or where the console is neither terminal nor notebook, it draws none."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
        """A bar while the block runs; call what it gives with the amount done since."""
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
