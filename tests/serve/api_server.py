"""A server as a user starts it: the command in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
from forked import fork_command
from openai import OpenAI

SECONDS_TO_START = 60
PEFT: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "whole": {"modules_to_save": ["lm_head"]}}


class Server:
    """A running `training-lens serve`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._process = fork_command(folder, "serve", *arguments, "--port", "0", "--json")
        self.started = self._wait_for_start()
        self.url = str(self.started["address"]).removesuffix("/v1")
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _wait_for_start(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < until and self._process.is_alive():
            output = self.folder / "stdout.txt"
            if output.exists() and (text := output.read_text()).endswith("\n"):
                return dict(json.loads(text))
            time.sleep(0.05)
        raise AssertionError((self.folder / "stderr.txt").read_text())

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the access log."""
        lines = (self.folder / "stderr.txt").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"time"')]

    def read_metrics(self, key: str = "none") -> dict[str, float]:
        """The values of metrics by their names, with labels."""
        page = self.http.get("/metrics", headers={"Authorization": f"Bearer {key}"}).text
        pairs = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def send_signal(self, number: int) -> None:
        assert self._process.pid
        os.kill(self._process.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit code."""
        if self._process.is_alive():
            self.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended; its exit code."""
        self.http.close()
        self._process.join(40)
        return self._process.exitcode if self._process.exitcode is not None else -99
