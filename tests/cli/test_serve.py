"""`training-lens serve` refuses what it cannot serve before it loads anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training_lens.cli import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latest", "latest"], "two models are named 'latest'; give one of them another name: OTHER=latest"),
        (
            ["latest", "temperature=0.5"],
            "'temperature=0.5' is read as NAME=RUN; the setting is inference.temperature=0.5",
        ),
        (["a="], "expected NAME=RUN"),
        (["no-such-run"], "no run 'no-such-run'"),
        (["none", "--host", "0.0.0.0"], "needs a key"),
        (["none", "--rows", "0"], "--rows"),
        (["none", "training.lr=1"], "training.lr=1: a run answers with its own config"),
    ],
)
def test_wrong_use_is_one_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["serve", *arguments])
    assert result.exit_code in (1, 2) and message in result.output


def test_a_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", "none", "--engine", "own", "--port", str(port)])
    assert result.exit_code == 2 and f"cannot listen on 127.0.0.1, port {port}" in result.output
