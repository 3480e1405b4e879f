"""Progress bars for anything that may take over two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Draws bars on a console; on None, or where the console is no terminal, it draws none."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    @contextmanager
    def task(self, title: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
        """A bar while the block runs; call what it gives with the amount done since."""
        if self._console is None or not self._console.is_terminal:
            yield lambda _amount: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(f"{title} ({unit})" if unit else title, total=total)
            yield lambda amount: bars.advance(task, amount)
