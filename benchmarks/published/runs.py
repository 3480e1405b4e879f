"""What the scripts here share: models with their data, a training run that is watched, and the file of results."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.training.loop.callbacks import Callback, StepReport

RESULTS = Path("benchmarks/results")
BATCH = 8
SHORT_TOKENS = 256


@dataclass(frozen=True)
class Setting:
    """A base model, and rows to train it on; `heldout` are rows of the same kind that are never trained on."""

    name: str
    model: str
    train: str
    heldout: str

    def short_rows(self, folder: str, **sections: dict[str, Any]) -> TrainingConfig:
        """`config` without the rows over `SHORT_TOKENS`, so that a run takes seconds."""
        data = {"truncation": "drop"} | sections.pop("data", {})
        return self.config(folder, model={"seq_len": SHORT_TOKENS}, data=data, **sections)

    def config(self, folder: str, **sections: dict[str, Any]) -> TrainingConfig:
        """A run of it without validation, the learning rate constant from the first step and gradients unclipped."""
        training = {"scheduler": "constant", "warmup_ratio": 0.0, "max_grad_norm": None, "batch_size": BATCH}
        return TrainingConfig.model_validate(
            {
                "model": {"id": self.model, "device": "cpu"} | sections.get("model", {}),
                "data": {"train": self.train, "validation": []} | sections.get("data", {}),
                "peft": sections.get("peft", {}),
                "training": training | sections.get("training", {}),
                "tracking": {"tensorboard": False},
                "lens": {"enabled": False},
                "output": {"base_output_dir": folder},
            }
        )


def settings(shared: Path) -> tuple[Setting, Setting, Setting]:
    """Two models, one of them on rows near to what it knows and on rows far from it."""
    gsm8k = shared / "data/gsm8k"
    stories = str(shared / "models/tinystories-656k")
    rows = str(gsm8k / "train.jsonl"), str(gsm8k / "test.jsonl")
    return (
        Setting("tinystories-656k on GSM8K", stories, *rows),
        Setting("embedded on its instructions", "embedded", "embedded:train", "embedded:heldout"),
        Setting("embedded on GSM8K", "embedded", *rows),
    )


class Record(Callback):
    """Keeps the report of each step, and the trainer with the trained model."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.trainer: Any = None

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        self.reports.append(report)
        self.trainer = trainer

    @property
    def losses(self) -> list[float]:
        """Of each step, in nats per supervised token, before its update."""
        return [report.loss for report in self.reports]


def trained(config: TrainingConfig, *callbacks: Callback) -> Record:
    """Train what the config describes, and what was seen of it; quiet about the data, of which it would say the same
    every time."""
    logging.getLogger("training_lens").setLevel(logging.ERROR)
    record = Record()
    TrainingWrapper(config, callbacks=(*callbacks, record)).train()
    return record


def parsed(description: str | None, results: str) -> argparse.Namespace:
    """The options that the scripts share: where models and data are, and which file to write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=RESULTS / results)
    parser.add_argument("--quick", action="store_true", help="a few steps and seeds, to see that it runs")
    return parser.parse_args()


def write_results(path: Path, results: dict[str, Any], seconds: float) -> None:
    """Results as JSON, floats to six digits, with the machine and the seconds that they took."""
    whole = {"machine": machine(), "seconds": round(seconds), **results}
    path.write_text(json.dumps(_short(whole), indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    return {
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_short(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
