"""In a notebook, progress is one output of text and HTML that is updated in place; nowhere else is one shown."""

from __future__ import annotations

import io
from typing import Any

import nbformat
from nbclient import NotebookClient
from rich.console import Console

from training_lens.display.progress import Progress, create_bars, notebook_console

SHOWS = """
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from training_lens.display.progress import create_bars
columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} {task.fields[more]}"))
drawn = create_bars(Console(), *columns)
with drawn:
    task = drawn.add_task("training", total=30, more="")
    for i in range(30):
        drawn.update(task, completed=i + 1, more="<b>loss</b>")
"""
SHORT = """
from training_lens.display.progress import notebook_console
from training_lens.display.progress import Progress
with Progress(notebook_console()).task("reading", 3) as advance:
    advance(3)
"""


def outputs(*cells: str) -> list[list[Any]]:
    """What cells leave in a notebook, run by a real kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def test_one_output_with_the_last_state_and_none_of_what_is_short() -> None:
    (shown,), short = outputs(SHOWS, SHORT)
    assert shown.output_type == "display_data" and "\x1b" not in str(shown)
    text, html = shown.data["text/plain"], shown.data["text/html"]
    assert text.startswith("training ━") and text.endswith("30 <b>loss</b>")
    assert "&lt;b&gt;loss" in html and "<b>loss" not in html
    assert short == []


def test_outside_of_notebooks_there_is_none() -> None:
    assert notebook_console() is None
    assert create_bars(None) is None and create_bars(Console(file=io.StringIO())) is None
    assert create_bars(Console(file=io.StringIO(), force_terminal=True)) is not None
    with Progress(None).task("reading", 3) as advance:
        advance(3)
