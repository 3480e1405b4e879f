"""Other programs that compute with an export: each by a script of its own, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from training_lens.errors import MergeError
from training_lens.merging.verification import Probes
from training_lens.utils.files import read_json, write_json


@dataclass(frozen=True)
class Computed:
    """What a program computed for the probes, and the other files that its script wrote as JSON."""

    logits: list[Tensor]  # of each row
    answers: list[list[int]]
    others: dict[str, Any]  # by the files' names without .json


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def compute_elsewhere(program: str, script: str, job: Mapping[str, Any], given: Probes) -> Computed:
    """Run a script with a job and the probes.

    Args:
        program: its name, for messages; `script` is the file that calls it.

    Raises:
        MergeError: it cannot load the job's files.
    """
    with tempfile.TemporaryDirectory(prefix="training-lens-export-") as place:
        path = Path(place) / "job.json"
        write_json(path, {**asdict(given), **job}, verbatim=True)
        command = [sys.executable, "-P", script, str(path)]  # -P keeps the script's folder out of the imports
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            last = done.stderr.strip().rsplit("\n", 1)[-1] or f"exit code {done.returncode}"
            raise MergeError(f"{program} cannot load what was written: {last}")
        with safe_open(path.with_name("logits.safetensors"), "pt") as file:
            logits = [file.get_tensor(str(i)) for i in range(len(given.rows))]
        files = {file.stem: read_json(file) for file in Path(place).glob("*.json") if file != path}
        return Computed(logits, files.pop("greedy"), files)
