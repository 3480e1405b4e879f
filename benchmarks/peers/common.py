"""What every trainer here has in common: the job it is given, how it is watched, and the line that it prints.

A job is a JSON file: `model` (a folder), `tokens` (a JSONL file of input_ids and labels), `batch`, `lr`, `rank`,
`alpha`, `seq_len`, `output` (a folder that may be filled), `mode`. Nothing here needs Training Lens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read_job() -> dict[str, Any]:
    """The job that the command line names."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return job


def read_rows(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The job's rows: input_ids, labels (-100 where nothing is learned) and attention_mask."""
    rows = [json.loads(line) for line in Path(job["tokens"]).read_text().splitlines()]
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]


class Watch:
    """Seconds and peak memory of what stands between `start` and `stop`.

    The peak is that of the process on a CPU (its largest resident set, counted anew from `start`), of the device's
    allocations on CUDA.
    """

    seconds = 0.0
    peak_bytes = 0

    def start(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak resident set size begins anew
        self._started = time.perf_counter()

    def stop(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started
        self.peak_bytes = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_bytes()


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def tell(watch: Watch, loss: float, **more: Any) -> None:
    """Print what was measured; `loss` is the mean of the steps' losses, in nats per supervised token."""
    print(json.dumps({"seconds": watch.seconds, "peak_bytes": watch.peak_bytes, "loss": loss, **more}))
