"""The command, as the scripts here call it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def command(*arguments: str) -> Any:
    """The JSON object that a training-lens command prints."""
    call = [sys.executable, "-m", "training_lens", *arguments, "--json"]
    return json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout)
