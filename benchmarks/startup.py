"""What it costs to start: from the command to a run's first step, and to the first token of an answer.

    python benchmarks/startup.py OLD NEW [--repeats 2]

OLD and NEW are checkouts; both run at the same time, on a core each, as in compare_versions.py. Seconds on the clock
and of CPU time (user and system, with the process's children) for the embedded model and a Llama of 125 M random
weights. Importing torch and transformers alone is measured beside them: no command can cost less.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from compare_versions import QUIET, ROWS, Measurements, compare

RESULTS = Path(__file__).parent / "results" / "startup.json"
TICKS = os.sysconf("SC_CLK_TCK")
IMPORTS = "import torch, transformers; from transformers import AutoModelForCausalLM, AutoTokenizer"


def start(checkout: Path, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A Python process that imports this version of the product."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(checkout / "src")},
    )  # fmt: skip


def time_process(checkout: Path, folder: Path, what: str, *arguments: str) -> Measurements:
    """What the process costs from its start to its end."""
    began = time.perf_counter()
    process = start(checkout, folder, *arguments)
    assert process.stdout
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(output.decode())
    return {f"{what}, seconds": time.perf_counter() - began, f"{what}, CPU seconds": used.ru_utime + used.ru_stime}


def read_cpu_seconds(pid: int) -> float:
    """CPU time of a live process and of its children that have ended, from proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / TICKS  # utime, stime, cutime, cstime


def time_first_steps(checkout: Path, folder: Path, name: str, *settings: str) -> Measurements:
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
    seconds, cpu_seconds = time.perf_counter() - began, read_cpu_seconds(process.pid)
    if process.wait():
        raise SystemExit(process.communicate()[0].decode())
    steps = [row["seconds"] for row in map(json.loads, journal.read_text().splitlines()) if row["kind"] == "step"]
    return {
        f"{name}: first step, seconds": seconds,
        f"{name}: first step, CPU seconds": cpu_seconds,
        f"{name}: first step over second": steps[0] / steps[1],
    }


def measure(checkout: Path, folder: Path, model: Path) -> Measurements:
    """Every measurement with one version; `folder` is empty."""
    found = time_process(checkout, folder, "import torch and transformers", "-c", IMPORTS)
    large = (f"model.id={model}", "model.seq_len=256", "training.precision=fp32", "data.max_examples=64")
    for name, settings in (("embedded", ("data.max_examples=160", "model.seq_len=256")), ("125m", large)):
        found |= time_first_steps(checkout, folder, name, *settings)
        answer = ("-m", "training_lens", "infer", "--run", name, "What is 3 plus 4?", "inference.max_new_tokens=1")
        found |= time_process(checkout, folder, f"{name}: first token of infer", *answer)
    return found


if __name__ == "__main__":
    compare(__doc__, measure, RESULTS)
