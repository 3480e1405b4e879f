"""What the tests of integrations share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def couriers_of() -> Callable[[int], list[int]]:
    """The couriers that a process started: their process ids."""

    def found(pid: int | None = None) -> list[int]:
        files = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
        children = [int(child) for file in files for child in file.read_text().split()]
        return [child for child in children if b"courier" in Path(f"/proc/{child}/cmdline").read_bytes()]

    return found
