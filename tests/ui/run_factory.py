"""Run folders in the real format, without training: many of them, or one with very many steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.utils.integrity import seal_line, write_sealed

CONFIG = {
    "model": {"id": "embedded"},
    "data": {"train": ["rows.jsonl"]},
    "training": {"lr": 1e-4, "epochs": 1.0, "max_steps": None},
    "peft": {"r": 8},
}


def write_run(outputs: Path, experiment: str, run_id: str, steps: int = 10, status: str = "finished") -> RunFolder:
    """A run of so many steps whose loss falls, with a validation at its end."""
    run = RunFolder(runs_folder(str(outputs), experiment) / run_id)
    for folder in (run.metadata, run.logs, run.reports):
        folder.mkdir(parents=True)
    (run.metadata / "config.json").write_text(json.dumps(CONFIG))
    summary = {
        "run_dir": str(run.root),
        "status": status,
        "steps": steps,
        "seconds": 0.1 * steps,
        "validation_loss": 1.0,
        "base_validation_loss": 3.0,
        "adapter_step": steps,
    }
    write_sealed(run.metadata / "summary.json", summary)
    with run.metrics_file.open("w") as file:
        file.write(seal_line({"kind": "base", "step": 0, "loss": 3.0, "time": 0.0}) + "\n")
        for step in range(1, steps + 1):
            file.write(seal_line(step_line(step, steps)) + "\n")
        file.write(seal_line({"kind": "validation", "step": steps, "loss": 1.0, "time": 0.1 * steps}) + "\n")
    return run


def step_line(step: int, steps: int) -> dict[str, object]:
    values = {"loss": 1 + 2 * math.exp(-5 * step / steps), "grad_norm": 1.0, "lr": 1e-4, "tokens": 100, "seconds": 0.1}
    return {"kind": "step", "step": step, "epoch": step / steps, **values, "finite": True, "time": 0.1 * step}
