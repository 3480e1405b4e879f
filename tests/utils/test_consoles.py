"""What is shown is what was said: no bracket in a name, a path or a row is taken for markup, a colour or an emoji."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

import training_lens
from training_lens.cli.common import Screen, show_table
from training_lens.display.progress import Progress
from training_lens.utils.logging import plain_console

WORDS = "[bold red]a[/] [/] [link=file:///x]b[/link] :smile: [draft] rows.jsonl"


def test_texts_titles_and_cells_are_shown_as_they_are() -> None:
    console = plain_console(file=io.StringIO(), width=200)
    table = Table(WORDS, title=WORDS)
    table.add_row(WORDS)
    console.print(WORDS)
    console.print(table)
    assert console.file.getvalue().count(WORDS) == 4  # type: ignore[attr-defined]


def test_no_text_of_data_commands_the_terminal() -> None:
    """A row with control characters, as a line and as a cell: a terminal gets their pictures."""
    evil = "a\x1b[2J\x07b\x9b1mc\r\x00\x08"
    console = plain_console(file=io.StringIO(), width=200)
    Screen(console, False, io.StringIO()).print_line(evil)
    show_table(console, "", ["row"], [[evil]])
    assert console.file.getvalue().count("a␛[2J␇b\ufffd1mc␍␀␈") == 2  # type: ignore[attr-defined]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", console.file.getvalue())  # type: ignore[attr-defined]


def test_a_bar_has_its_title_as_it_is() -> None:
    console = plain_console(file=io.StringIO(), width=200, force_terminal=True)
    with Progress(console).task(WORDS, 1):
        pass
    assert WORDS in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]


def test_every_console_is_such_a_one_and_no_text_of_ours_is_markup() -> None:
    for path in Path(training_lens.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert path.name == "logging.py" or not re.search(r"(?<![\w.])Console\(", text), path
        assert not re.search(r"\[/(bold|dim|red|green|italic)?\](?!\w)", text), path
        assert not re.search(r"from_markup|TextColumn\((?!.*markup=False)", text), path


def test_a_folder_with_brackets_is_a_folder(call: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "[bold] [a,b] {c} $d"
    folder.mkdir()
    (folder / "[draft] rows[1].jsonl").write_text('{"question": "[bold]a[/]", "answer": "[/] b"}\n' * 4)
    rows = folder / "[draft] rows[1].jsonl"
    shown = call("validate", f"data.train={rows}", f"output.base_output_dir={folder / '[out]'}", "data.validation=null")
    assert shown.exit_code == 0, shown.output
    assert "[bold]a[/]" in shown.output and (folder / "[out]").is_dir()
    told = call("experiment", "list", f"output.base_output_dir={folder / '[/]'}")
    assert f"no such runs in {folder / '[/]'}" in told.stdout


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from typer.testing import CliRunner

    from training_lens.cli import cli

    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli, list(words))
