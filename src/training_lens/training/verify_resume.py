"""Checks on this machine that an interrupted and resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from training_lens.config.schema import TrainingConfig
from training_lens.errors import TrainingError
from training_lens.runs.checkpoint_format import checkpoint_folder, verify_checkpoint
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.training.loop.callbacks import Callback
from training_lens.training.loop.checkpoint_manager import STATE
from training_lens.training.run import TrainingWrapper

STEPS, RESUMED_AFTER = 4, 2
TIMINGS = {"seconds", "time"}
NO_TRACKING = {
    "tensorboard": False, "samples": 0, "histograms_every": None, "custom": {}, "hub": {"repo": None},
    "wandb": {"mode": "disabled"}, "mlflow": {"enabled": False}, "trackio": {"enabled": False},
}  # fmt: skip


@dataclass(frozen=True)
class ResumeComparison:
    """What was compared after `steps` steps between a run and one resumed after `resumed_after`, and what differs."""

    steps: int
    resumed_after: int
    compared: tuple[str, ...]
    different: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        return not self.different

    def as_json(self) -> dict[str, Any]:
        return {"exact": self.is_exact, **asdict(self)}


class _Interruption(Callback):
    """Interrupts the run one step after its checkpoint."""

    def on_step_end(self, trainer: Any, report: Any) -> None:
        if report.step > RESUMED_AFTER:
            raise KeyboardInterrupt


def verify_resume(config: TrainingConfig, console: Console | None = None) -> ResumeComparison:
    """Train the first steps of `config` twice, once interrupted and resumed in a fresh process, and compare.

    Both runs are in a temporary experiment. Cost: twice the steps, with their validations.

    Raises:
        TrainingLensError: anything that would keep `train` from starting; TrainingError: the resume failed.
    """
    output = config.output
    config = config.replace_keys(
        training={"max_steps": STEPS, "save_steps": RESUMED_AFTER, "early_stopping_patience": None},
        lens={"enabled": False},
        tracking=NO_TRACKING,
        output={"experiment_name": f"verify-resume-{secrets.token_hex(4)}", "mirror": None},
    )
    runs = runs_folder(output.base_output_dir, config.output.experiment_name)
    straight, resumed = RunFolder(runs / "straight"), RunFolder(runs / "resumed")
    try:
        _train_steps(config, straight, console)
        _train_steps(config, resumed, console, _Interruption())
        command = [sys.executable, "-m", "training_lens", "train", "--resume", str(resumed.root)]
        ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
        if ended.returncode:
            raise TrainingError(f"the interrupted run could not be resumed: {ended.stderr.strip()}")
        one, two = (dict(_read_results(run)) for run in (straight, resumed))
        different = tuple(name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name))
        return ResumeComparison(STEPS, RESUMED_AFTER, tuple(one), different)
    finally:
        shutil.rmtree(runs.parent, ignore_errors=True)


def _train_steps(config: TrainingConfig, run: RunFolder, console: Console | None, *callbacks: Callback) -> None:
    own = config.replace_keys(output={"run_id": run.run_id})
    try:
        TrainingWrapper(own, console=console, callbacks=callbacks).train()
    except KeyboardInterrupt:
        if not callbacks or not checkpoint_folder(run.checkpoints, RESUMED_AFTER).is_dir():
            raise  # Ctrl-C of the user


def _read_results(run: RunFolder) -> Iterator[tuple[str, Any]]:
    """What must be equal, by name: each line of metrics.jsonl, each file of the last checkpoint and of the adapter."""
    for line in read_metrics(run.metrics_file):
        values = {key: value for key, value in line.items() if key not in TIMINGS}
        yield f"{line['kind']} {line['step']}", values
    for name, sha256 in verify_checkpoint(checkpoint_folder(run.checkpoints, STEPS)).files.items():
        if Path(name).name != STATE:  # which holds timings
            yield f"checkpoint {STEPS}: {name}", sha256
    yield "adapter", [path.read_bytes() for path in sorted(run.adapter.iterdir())]
