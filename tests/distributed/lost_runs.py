"""Runs on two processes that are disturbed, and what they must still come to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

STEPS = 40


def settings_of(folder: Path) -> list[str]:
    """A run with a checkpoint at every fifth step."""
    run = [f"training.max_steps={STEPS}", "training.batch_size=4", "training.save_steps=5", "model.device=cpu"]
    off = ["lens.enabled=false", "tracking.samples=0", "tracking.tensorboard=false"]
    return [*run, *off, f"output.base_output_dir={folder}/outputs"]


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`training-lens train` of that run on two processes."""
    command = [sys.executable, "-m", "training_lens", "train", "distributed.processes=2", *settings_of(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)


def complete(process: subprocess.Popen[str]) -> str:
    """Wait for a command that must succeed; what it wrote to standard error."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def find_run(folder: Path, run_id: str) -> RunFolder:
    """The run of this id, which need not be there yet."""
    return RunFolder(folder / "outputs/experiments/default/runs" / run_id)


def wait_for_checkpoint(run: RunFolder, step: int) -> None:
    """Until the run has saved a step."""
    deadline = time.monotonic() + 300
    while not (run.checkpoints / f"step-{step:08d}").is_dir():
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)


def assert_same_results(run: RunFolder, other: RunFolder) -> None:
    """Bit for bit: the losses of all steps, and the adapter."""
    losses = [[line["loss"] for line in read_metrics(r.metrics_file) if line["kind"] == "step"] for r in (run, other)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    found, wanted = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, other))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
