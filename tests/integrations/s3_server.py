"""A server that speaks S3, as a process of its own: moto's, which keeps all in memory. Killed, it comes back empty."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BUCKET = "bucket"


class Server:
    """The server, seen from a test. `environment` leads clients to it."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "planted-access-key-id",
            "AWS_SECRET_ACCESS_KEY": "planted-secret-access-key",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or empty the one that runs; then make the bucket."""
        if self._process is None:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: self._ask("POST", "/moto-api/reset"), "no server")
        assert self._ask("PUT", f"/{BUCKET}")

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return int(self._process.pid)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, method: str, path: str) -> bool:
        with suppress(OSError), urllib.request.urlopen(urllib.request.Request(self.url + path, method=method)):
            return True
        return False


def until(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)
