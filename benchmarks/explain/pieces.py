"""Results in pieces: a script that was stopped, or ran out of its time, goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Pieces:
    """Values by name in a JSON file.

    Args:
        seconds: after so many no further piece begins, and the script ends with exit code 75: call it again.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self._longest = 0.0
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def compute(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value of a piece, computed where it is not known yet."""
        if name not in self.values:
            if time.monotonic() + self._longest > self._end:
                print(f"out of time before {name}: call it again", file=sys.stderr)
                sys.exit(75)
            started = time.monotonic()
            self.values[name] = compute()
            self._longest = max(self._longest, time.monotonic() - started)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.values))
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        return self.values[name]
