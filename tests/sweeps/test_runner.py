"""A sweep of real trials: each a normal run, the best a config that trains, one bad trial no end of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens import TrainingWrapper
from training_lens.config.compose import compose
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, InterruptedRunError, OutOfMemoryError, TrainingError
from training_lens.sweeps.leaderboard import Row
from training_lens.sweeps.runner import Sweep
from training_lens.training.trainer import Trainer
from training_lens.utils.runs import RunFolder

Config = Callable[..., TrainingConfig]


def test_each_trial_is_a_run_and_the_best_one_trains_from_its_file(sweep_config: Config) -> None:
    shown: list[Row] = []
    config = sweep_config(space={"training.lr": [1e-4, 1e-2], "peft.r": [2, 4]}, sampler="grid", trials=9)
    result = Sweep(config, on_trial=shown.append).run()
    board, best = result.leaderboard, result.leaderboard.best
    assert best is not None and len(shown) == board.count("finished") == 4  # the grid's size
    losses = [row.validation_loss or 0 for row in board.rows]
    assert losses == sorted(losses) and best.params["training.lr"] == 1e-2
    assert set(board.importances) == {"training.lr", "peft.r"}
    for row in board.rows:
        run = RunFolder(Path(row.run_dir or ""))
        used = run.read_metadata("config.json")
        assert run.status == "finished" and run.run_id == row.run_id
        assert (used["training"]["lr"], used["peft"]["r"]) == (row.params["training.lr"], row.params["peft.r"])
        assert used["output"]["experiment_name"] == used["sweep"]["name"] == "sweep"
    assert json.loads(Path(result.files["leaderboard.json"]).read_text())["rows"][0]["trial"] == best.trial
    page = Path(result.files["report.html"]).read_text()
    assert best.run_id in page and "PED-ANOVA" in page and page.count("Plotly.newPlot") >= 3

    again = TrainingWrapper(compose(result.files["best.yaml"])).train()
    assert again.validation_loss == best.validation_loss
    assert "/experiments/default/" in again.run_dir


def test_a_failed_trial_is_noted_and_the_sweep_goes_on(sweep_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.train_step

    def without_memory(self: Trainer, plan: Any) -> Any:
        if self.model.peft_config["default"].r == 8:
            raise MemoryError("out of memory")
        return real(self, plan)

    monkeypatch.setattr(Trainer, "train_step", without_memory)
    board = Sweep(sweep_config(space={"peft.r": [2, 4, 8]}, sampler="grid")).run().leaderboard
    assert (board.count("finished"), board.count("failed")) == (2, 1)
    failed = board.rows[-1]
    assert failed.params == {"peft.r": 8} and "does not fit into memory" in (failed.error or "")


def test_where_the_first_trials_all_fail_the_sweep_ends_with_the_reason(
    sweep_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Trainer, resume: bool = False) -> Any:
        raise OutOfMemoryError("too large.")

    monkeypatch.setattr(Trainer, "fit", broken)
    shown: list[Row] = []
    with pytest.raises(TrainingError, match=r"the first 3 trials .* failed.*too large\."):
        Sweep(sweep_config(trials=9), on_trial=shown.append).run()
    assert [row.state for row in shown] == ["failed"] * 3


def test_an_interrupted_trial_is_gone_on_with(sweep_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in its second trial and started again, the sweep ends as the one that was left in peace."""
    peaceful = Sweep(sweep_config(name="peaceful", trials=3)).run().leaderboard
    config = sweep_config(trials=3)
    real, runs = Trainer._leave_if_asked, list[Trainer]()

    def leave(self: Trainer) -> None:
        runs.extend([] if self in runs else [self])
        self._signal = 2 if len(runs) == 2 else 0
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_leave_if_asked", leave)
        with pytest.raises(InterruptedRunError, match="the sweep goes on with this trial") as caught:
            Sweep(config).run()
    assert caught.value.exit_code == 130
    shown: list[Row] = []
    board = Sweep(config, on_trial=shown.append).run().leaderboard
    assert len(shown) == 2 and shown[0].trial == 1
    log = (Path(shown[0].run_dir or "") / "logs/run.log").read_text()
    assert "resuming after step 1 of 2" in log
    results = [
        [(row.params, row.validation_loss) for row in found.rows if row.state == "finished"]
        for found in (peaceful, board)
    ]
    assert results[0] == results[1] and len(results[0]) == 3


def test_a_hopeless_trial_is_pruned(sweep_config: Config) -> None:
    config = sweep_config(
        training={"max_steps": 3, "eval_steps": 1},
        space={"training.lr": [1e-2, 8e-3, 6e-3, 1e-6]},
        pruner="successive_halving",
        sampler="grid",
        trials=4,
    )
    board = Sweep(config).run().leaderboard
    assert board.count("pruned") + board.count("finished") == 4 and board.count("pruned") > 0
    pruned = [row for row in board.rows if row.state == "pruned"]
    assert 1e-6 in [row.params["training.lr"] for row in pruned]
    for row in pruned:
        run = RunFolder(Path(row.run_dir or ""))
        assert run.status == "pruned" and not run.adapter.exists()


def test_trials_have_ids_of_their_own(sweep_config: Config) -> None:
    config = sweep_config()
    config.output.run_id = "mine"
    with pytest.raises(ConfigurationError, match=r"output\.run_id: each trial"):
        Sweep(config)


def test_a_sweep_needs_validation_rows(sweep_config: Config) -> None:
    config = sweep_config()
    config.data.validation = None
    with pytest.raises(ConfigurationError, match=r"sweep\.metric: .* give data\.validation or data\.val_ratio"):
        Sweep(config)
