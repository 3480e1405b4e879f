"""Dashboards as a user starts them: the command in a process of its own, over a folder of real runs."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import fork_command

ADDRESS = re.compile(r"http://\S+")
SECONDS_TO_START = 30


class Dashboard:
    """A running `training-lens ui`; `url` ends without '/', and `address` is what was printed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._process = fork_command(folder, "ui", *arguments)
        self.address = self._wait_for_address()
        self.url = self.address.partition("/?")[0].partition("/#")[0].rstrip("/")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def _wait_for_address(self) -> str:
        until = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < until and self._process.is_alive():
            output = self.folder / "stdout.txt"
            printed = output.read_text() if output.exists() else ""
            if (found := ADDRESS.search(printed)) and "Ctrl+C" in printed:
                return found[0]
            time.sleep(0.05)
        raise AssertionError((self.folder / "stderr.txt").read_text())

    def stop(self) -> int:
        """Stop it as Ctrl+C does; its exit code."""
        if self._process.is_alive() and self._process.pid:
            os.kill(self._process.pid, signal.SIGINT)
        self._process.join(20)
        return self._process.exitcode if self._process.exitcode is not None else -99


@pytest.fixture
def start_dashboard(tmp_path: Path) -> Iterator[Callable[..., Dashboard]]:
    """Starts dashboards, which end with the test: `start_dashboard(outputs, *options)`."""
    started: list[Dashboard] = []

    def start(outputs: Path, *options: str) -> Dashboard:
        dashboard = Dashboard(tmp_path / f"server-{len(started)}", str(outputs), "--port", "0", *options)
        started.append(dashboard)
        return dashboard

    yield start
    for dashboard in started:
        dashboard.stop()
