"""A dashboard in a process of its own, and the browser that looks at it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ADDRESS = re.compile(r"http://\S+")


@contextmanager
def serve(outputs: Path) -> Iterator[tuple[str, float, subprocess.Popen[str]]]:
    """A server in a process of its own: its address, the seconds until it printed it, and the process."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "training_lens", "ui", str(outputs), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "500"})
    assert process.stdout is not None
    address = None
    while address is None:
        line = process.stdout.readline()
        assert line, "the server ended before it printed its address"
        address = ADDRESS.search(line)
    try:
        yield address[0].rstrip("/"), time.perf_counter() - begun, process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The system's Chromium."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        yield browser
        browser.close()
