"""A sweep of several processes: killed and started again twice over, it repeats nothing."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.config.schema import TrainingConfig
from training_lens.runs.run_folder import runs_folder
from training_lens.sweeps.runner import Sweep
from training_lens.training.loop.trainer import Trainer


def run_sweep(config: TrainingConfig, ended: Path, hang_in: int | None = None) -> None:
    """A process of the sweep: a line in `ended` for each trial that ends in it.

    Args:
        hang_in: the number of a trial that never comes to its second step; then there is a last line, `hangs`.
    """
    torch.set_num_threads(1)  # the fork's thread pool is made anew here, before two threads ask for it at once
    real = Trainer.train_step

    def step(self: Trainer, plan: Any) -> Any:
        if plan.number == 2 and ended.read_text().count("\n") == hang_in:
            print("hangs", file=file)
            signal.pause()
        return real(self, plan)

    Trainer.train_step = step  # type: ignore[method-assign]
    with ended.open("a", encoding="utf-8", buffering=1) as file:
        Sweep(config, on_trial=lambda row: print(row.trial, row.state, row.params, row.error, file=file)).run()


@pytest.mark.slow
def test_killed_and_started_again_by_two_processes_nothing_is_repeated(
    sweep_config: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    Sweep(sweep_config(name="before", trials=1)).run()  # what a sweep imports is then there in every fork
    config, forked, ended = sweep_config(trials=4), multiprocessing.get_context("fork"), tmp_path / "ended.txt"
    runs = runs_folder(config.output.base_output_dir, config.sweep.name)
    killed = forked.Process(target=run_sweep, args=(config, ended, 2))
    killed.start()
    while not ended.exists() or "hangs" not in ended.read_text():
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    before = ended.read_text().splitlines()[:-1]
    assert killed.exitcode == -signal.SIGKILL and len(before) == 2
    ended.write_text("".join(f"{line}\n" for line in before))
    written = {file: file.stat().st_mtime_ns for file in runs.glob("*/metadata/summary.json")}
    written = {file: at for file, at in written.items() if '"finished"' in file.read_text()}

    processes = [forked.Process(target=run_sweep, args=(config, ended)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    trials = ended.read_text().splitlines()
    assert len(trials) == len({line.split("{")[1] for line in trials}) == 4 and trials[: len(before)] == before
    assert [line for line in trials if " finished " not in line] == []
    assert len(written) == 2 and {file: file.stat().st_mtime_ns for file in written} == written
    assert len(list(runs.iterdir())) == 4
    assert Sweep(config).run().leaderboard.count_trials("finished") == 4  # nothing is left to run
