"""What is given without a value is wrong usage: it never means what a missing option does, nor the folder one is in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from training_lens.cli import cli
from training_lens.config.compose import compose
from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, IntegrationError
from training_lens.integrations.storage import open_storage
from training_lens.runs.run_lookup import find_run

Call = Callable[..., Any]
ROOT_COMMAND: Any = typer.main.get_command(cli)


def options() -> list[tuple[str, ...]]:
    """Every option of every command that takes a text."""

    def of(command: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        if hasattr(command, "commands"):
            inner = {name: command.get_command(click.Context(command), name) for name in command.commands}
            return [found for name, one in inner.items() for found in of(one, (*path, name))]
        taken = [p for p in command.params if p.param_type_name == "option" and not p.is_flag]
        return [(*path, p.opts[0]) for p in taken if p.type_descriptor.annotation in (str, str | None, list[str])]

    return of(ROOT_COMMAND, ())


@pytest.mark.parametrize(("words", "empty"), list(zip(options(), cycle(["", " ", "\t"]), strict=False)), ids=str)
def test_no_option_takes_an_empty_text(call: Call, words: tuple[str, ...], empty: str) -> None:
    needed = {"export": ("--data-type", "loss"), "tag": ("RUN", "x"), "compare": ("a", "b"), "push": ("RUN",)}
    needed |= {"show": ("RUN",), "delete": ("RUN",), "export-adapter": ("--to", "plain")}
    of_runs = words[0] in ("experiment", "export", "export-adapter", "push")
    result = call(*words, empty, *(needed.get(words[-2], ()) if of_runs else ()))
    assert result.exit_code == 2 and f"error: {words[-1]}: given without a value" in result.stderr, result.output
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words", [("report", ""), ("sync", " "), ("push", ""), ("experiment", "delete", "", "--yes")])
def test_no_argument_takes_an_empty_text(call: Call, words: tuple[str, ...]) -> None:
    Path("metadata").mkdir()  # the folder that one is in looks like a run's
    result = call(*words)
    assert result.exit_code == 2 and "given without a value" in result.stderr
    assert Path("metadata").is_dir()


@pytest.mark.parametrize("value", ["", "  ", "''", '"  "'])
def test_no_key_takes_an_empty_text(value: str) -> None:
    keys = {*known_keys(TrainingConfig)} - {"data.train", "data.validation"}  # of rows, see test_bad_input
    with pytest.raises(ConfigurationError) as caught:
        compose(overrides=[f"{key}={value}" for key in keys])
    assert keys <= {problem.split(":")[0] for problem in caught.value.problems}


def test_no_place_is_an_empty_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metadata").mkdir()
    for name in ("", " "):
        with pytest.raises(ConfigurationError, match=r"empty name|is empty"):
            find_run(name, "outputs")
    for name in ("", " ", "file://", "local://"):
        with pytest.raises(IntegrationError, match=r"empty name|is empty"):
            open_storage(name)
