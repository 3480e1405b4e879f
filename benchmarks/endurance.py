"""Whether a long run with everything on grows: slopes of memory, handles and threads over its steps.

    python benchmarks/endurance.py [STEPS]

The embedded model trains on few short rows, with lens, samples, histograms, TensorBoard and a mirror. After the first
tenth of the steps, a line is fitted through the means of blocks of steps: samples that follow each other are alike, and
the line's standard error would be too small by them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import described

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.training.loop.callbacks import Callback, StepReport

RESULTS = Path(__file__).parent / "results" / "endurance.json"
STEPS, EVERY, BLOCKS = 20_000, 10, 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Watch(Callback):
    """Samples of the process: resident MiB, open descriptors, threads."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.samples: dict[str, list[float]] = {"resident_mib": [], "handles": [], "threads": []}

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        if report.step % EVERY == 0:
            self.steps.append(report.step)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found = (pages * PAGE_BYTES / 2**20, len(list(Path("/proc/self/fd").iterdir())), threading.active_count())
            for values, value in zip(self.samples.values(), found, strict=True):
                values.append(value)


def slope(steps: Sequence[int], values: Sequence[float]) -> Mapping[str, Any]:
    """The line through block means: its rise over 1,000 steps, with its standard error; and those means."""
    settled = len(steps) // 10
    x = np.array([block.mean() for block in np.array_split(np.array(steps[settled:]) / 1000, BLOCKS)])
    y = np.array([block.mean() for block in np.array_split(np.array(values[settled:]), BLOCKS)])
    (rise, _), covariance = np.polyfit(x, y, 1, cov=True)
    error = float(np.sqrt(covariance[0, 0]))
    blocks = [round(float(mean), 2) for mean in y]
    return {"per_1000_steps": float(rise), "standard_error": error, "blocks": blocks}


def measure(steps: int) -> dict[str, Any]:
    watch = Watch()
    with tempfile.TemporaryDirectory() as place:
        values = {
            "data": {"max_examples": 64},
            "model": {"seq_len": 64},
            "peft": {"r": 2},
            "training": {"max_steps": steps, "batch_size": 2, "eval_steps": 250},
            "output": {"base_output_dir": f"{place}/outputs", "mirror": f"{place}/mirror"},
        }
        TrainingWrapper(TrainingConfig.model_validate(values), callbacks=(watch,)).train()
    slopes = {name: slope(watch.steps, found) for name, found in watch.samples.items()}
    return {"machine": described(), "steps": steps, "slopes": slopes}


if __name__ == "__main__":
    measured = measure(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
    print(json.dumps(measured, indent=2))
    if measured["steps"] >= STEPS:
        RESULTS.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
