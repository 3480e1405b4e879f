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

SHORT = 1.0  # seconds: shorter tasks leave no output in a notebook


def create_bars(
    console: Console | None, *columns: ProgressColumn, transient: bool = False, after: float = 0.0
) -> RichProgress | None:
    """Progress bars for a terminal or a notebook; None for any other console.

    Args:
        transient: remove the bars at the end; a notebook keeps them.
        after: seconds before they appear in a notebook.
    """
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
