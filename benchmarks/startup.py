"""What it costs to start: from the command to a run's first step, and to the first token of an answer.

    python benchmarks/startup.py OLD NEW [--repeats 2]

OLD and NEW are checkouts; each command runs in a process of its own, in turn for both. Seconds on the clock and of CPU
time (user and system, with the process's children), the fewest of all repeats, for the embedded model and a Llama of
125 M random weights. Importing torch and transformers alone is measured beside them: no command can cost less.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_versions import QUIET, ROWS, compare

RESULTS = Path(__file__).parent / "results" / "startup.json"
TICKS = os.sysconf("SC_CLK_TCK")
IMPORTS = "import torch, transformers; from transformers import AutoModelForCausalLM, AutoTokenizer"


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock and of CPU time."""

    wall: float
    cpu: float

    def __lt__(self, other: Cost) -> bool:
        return self.cpu < other.cpu


def start(checkout: Path, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A Python process that imports this version of the product."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(checkout / "src")},
    )  # fmt: skip


def time_process(checkout: Path, folder: Path, *arguments: str) -> Cost:
    """What the process costs from its start to its end."""
    before, began = os.times(), time.perf_counter()
    process = start(checkout, folder, *arguments)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(output.decode())
    after = os.times()
    return Cost(
        time.perf_counter() - began,
        after.children_user - before.children_user + after.children_system - before.children_system,
    )


def read_cpu_seconds(pid: int) -> float:
    """CPU time of a live process and of its children that have ended, from proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / TICKS  # utime, stime, cutime, cstime


def time_first_steps(checkout: Path, folder: Path, name: str, *settings: str) -> dict[str, Cost | float]:
    """What a run costs up to the end of its first step, and how many times the second step the first one takes."""
    began = time.perf_counter()
    process = start(
        checkout, folder, "-m", "training_lens", "train", f"data.train={ROWS}", f"output.run_id={name}",
        "training.max_steps=4", "lens.enabled=false", *QUIET, *settings,
    )  # fmt: skip
    journal = folder / f"outputs/experiments/default/runs/{name}/logs/metrics.jsonl"
    while not (journal.exists() and re.search('"kind": ?"step"', journal.read_text())):
        if process.poll() is not None:
            raise SystemExit(process.communicate()[0].decode())
        time.sleep(0.005)
    first = Cost(time.perf_counter() - began, read_cpu_seconds(process.pid))
    if process.wait():
        raise SystemExit(process.communicate()[0].decode())
    steps = [row["seconds"] for row in map(json.loads, journal.read_text().splitlines()) if row["kind"] == "step"]
    return {"first step": first, "first step over second": steps[0] / steps[1]}


def measure(checkout: Path, folder: Path, model: Path) -> dict[str, Cost | float]:
    """Every measurement with one version; `folder` is empty."""
    found: dict[str, Cost | float] = {"import torch and transformers": time_process(checkout, folder, "-c", IMPORTS)}
    large = (f"model.id={model}", "model.seq_len=256", "training.precision=fp32", "data.max_examples=64")
    for name, settings in (("embedded", ("data.max_examples=160", "model.seq_len=256")), ("125m", large)):
        found |= {f"{name}: {what}": x for what, x in time_first_steps(checkout, folder, name, *settings).items()}
        answer = ("-m", "training_lens", "infer", "--run", name, "What is 3 plus 4?", "inference.max_new_tokens=1")
        found[f"{name}: first token of infer"] = time_process(checkout, folder, *answer)
    return found


def pair_costs(old: Cost | float, new: Cost | float) -> dict[str, Any]:
    """Both measurements as plain values."""
    return {name: vars(cost) if isinstance(cost, Cost) else cost for name, cost in (("old", old), ("new", new))}


if __name__ == "__main__":
    compare(__doc__, measure, RESULTS, pair_costs)
