"""Training Lens on one job of train_speed.py, in a process of its own; prints the line that the peers print.

python benchmarks/train_ours.py JOB.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import Watch, read_job, tell

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.models.factory import load_model
from training_lens.runs.run_folder import RunFolder
from training_lens.training.adapted_base import build_trainer
from training_lens.training.lens_callback import build_capture_callback
from training_lens.training.loop.callbacks import Callback
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.plan import RunPlan

TEMPLATE = "### Instruction:\\n{instruction}\\n\\n### Response:\\n{output}"


def configured(job: dict[str, Any]) -> TrainingConfig:
    """The job as a config: what it does not say is as HF's trainer has it (linear to 0, no warm-up, AdamW)."""
    return TrainingConfig.model_validate(
        {
            "model": {"id": job["model"], "seq_len": job["seq_len"]},
            "data": {"train": [job["rows"]], "template": TEMPLATE, "truncation": job["truncation"]},
            "peft": {"r": job["rank"], "lora_alpha": job["alpha"]},
            "training": {
                "precision": "bf16",
                "batch_size": job["batch"],
                "lr": job["lr"],
                "epochs": 1,
                "scheduler": "linear",
                "warmup_ratio": 0.0,
            },
            "lens": {"enabled": job["mode"] == "ours_lens", "report": False},
            "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
            "output": {"base_output_dir": job["output"]},
        }
    )


def planned(job: dict[str, Any]) -> RunPlan:
    """The job's plan: tokens from the cache where another process made them."""
    return TrainingWrapper(configured(job)).plan()


class Steps(Callback):
    """Notes each step's loss and seconds, and stops the watch at its end: what is saved after that is not timed."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def on_step_end(self, trainer: Any, report: Any) -> None:
        self.watch.stop()
        self.losses.append(report.loss)
        self.seconds.append(report.seconds)
        self.tokens.append(report.tokens)


def main() -> None:
    job = read_job()
    plan = planned(job)
    run = RunFolder(Path(job["output"]) / "run").create()
    lens = build_capture_callback(plan, run.lens) if job["mode"] == "ours_lens" else None
    steps = Steps(Watch())
    model = load_model(plan.config.model, plan.processes.device, plan.precision)
    manager = CheckpointManager(run.checkpoints, plan.fingerprint)
    trainer = build_trainer(plan, model, manager, (*([lens] if lens else []), steps))
    steps.watch.start()
    trainer.fit()
    tell(steps.watch, statistics.fmean(steps.losses), step_seconds=steps.seconds, step_tokens=steps.tokens)


def write_tokens(job: dict[str, Any], path: Path) -> dict[str, int]:
    """The job's tokens as the peers read them; how many there are."""
    dataset = planned(job).train
    with path.open("w") as file:
        for example in dataset:
            labels = [int(i) if m else -100 for i, m in zip(example.input_ids, example.loss_mask, strict=True)]
            file.write(json.dumps({"input_ids": example.input_ids.tolist(), "labels": labels}) + "\n")
    return {
        "rows": len(dataset),
        "tokens": int(dataset.lengths.sum()),
        "supervised": int(dataset.supervised_counts.sum()),
    }


if __name__ == "__main__":
    main()
