"""A sweep of real trials: each a normal run, the best a config that trains, one bad trial no end of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from filelock import FileLock
from optuna.trial import TrialState
from slow_cases import slow_but
from tiny_models import SIZES

from training_lens import TrainingWrapper
from training_lens.config.compose import compose
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, InterruptedRunError, OutOfMemoryError, TrainingError
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.sweeps.leaderboard import Leaderboard, TrialRow
from training_lens.sweeps.runner import Sweep
from training_lens.sweeps.worker import Worker
from training_lens.training.loop.lr_schedule import default_lr
from training_lens.training.loop.trainer import Trainer

Config = Callable[..., TrainingConfig]
WriteRows = Callable[..., Path]


def outcomes(board: Leaderboard) -> list[tuple[dict[str, Any], float | None]]:
    return [(row.params, row.validation_loss) for row in board.rows if row.state == "finished"]


def before_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Trainer, Any], None]) -> None:
    """`act` happens as each step begins."""
    real = Trainer.train_step

    def step(self: Trainer, plan: Any) -> Any:
        act(self, plan)
        return real(self, plan)

    monkeypatch.setattr(Trainer, "train_step", step)


@pytest.mark.usefixtures("whole")
def test_each_trial_is_a_run_and_the_best_one_trains_from_its_file(sweep_config: Config) -> None:
    shown: list[TrialRow] = []
    config = sweep_config(space={"training.lr": [1e-4, 1e-2], "peft.r": [2, 4]}, sampler="grid", trials=9)
    result = Sweep(config, on_trial=shown.append).run()
    board, best = result.leaderboard, result.leaderboard.best
    assert best is not None and len(shown) == board.count_trials("finished") == 5  # the grid, and the default settings
    assert (shown[0].trial, shown[0].is_default) == (0, True) and not any(row.is_default for row in shown[1:])
    assert shown[0].params == {"training.lr": default_lr(SIZES["hidden_size"]), "peft.r": 4}
    losses = [row.validation_loss or 0 for row in board.rows]
    assert losses == sorted(losses) and best.params["training.lr"] > 1e-4
    assert set(board.importances) == {"training.lr", "peft.r"}
    for row in board.rows:
        run = RunFolder(Path(row.run_dir or ""))
        used = run.read_metadata("config.json")
        assert run.status == "finished" and run.run_id == row.run_id
        assert (used["training"]["lr"], used["peft"]["r"]) == (row.params["training.lr"], row.params["peft.r"])
        assert used["output"]["experiment_name"] == used["sweep"]["name"] == "sweep"
    assert json.loads(Path(result.files["leaderboard.json"]).read_text())["rows"][0]["trial"] == best.trial
    page = Path(result.files["report.html"]).read_text()
    assert best.run_id in page and "PED-ANOVA" in page and page.count("<svg class=") >= 2

    again = TrainingWrapper(compose(result.files["best.yaml"])).train()
    assert again.validation_loss == best.validation_loss
    assert "/experiments/default/" in again.run_dir


@pytest.mark.slow
def test_trials_are_not_pushed_where_each_would_replace_the_last(
    sweep_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = sweep_config(trials=1).replace_keys(tracking={"hub": {"repo": "me/adapter"}})
    (row,) = Sweep(config).run().leaderboard.rows
    assert RunFolder(Path(row.run_dir or "")).read_metadata("config.json")["tracking"]["hub"]["repo"] is None
    assert "trials are not pushed to me/adapter" in caplog.text


@pytest.mark.slow
def test_a_failed_trial_is_noted_and_the_sweep_goes_on(sweep_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(trainer: Trainer, _plan: Any) -> None:
        if trainer.model.peft_config["default"].r == 8:
            raise MemoryError("out of memory")

    before_step(monkeypatch, without_memory)
    board = Sweep(sweep_config(space={"peft.r": [2, 8]}, sampler="grid")).run().leaderboard
    assert (board.count_trials("finished"), board.count_trials("failed")) == (2, 1)
    failed = board.rows[-1]
    assert failed.params == {"peft.r": 8} and "does not fit into memory" in (failed.error or "")


def test_where_the_first_trials_all_fail_the_sweep_ends_with_the_reason(
    sweep_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TrainingWrapper) -> Any:
        raise OutOfMemoryError("too large.")

    monkeypatch.setattr(TrainingWrapper, "train", broken)
    shown: list[TrialRow] = []
    with pytest.raises(TrainingError, match=r"the first 3 trials .* failed.*too large\."):
        Sweep(sweep_config(trials=9), on_trial=shown.append).run()
    assert [row.state for row in shown] == ["failed"] * 3


@pytest.mark.slow
def test_an_interrupted_trial_is_gone_on_with(sweep_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in its second trial and started again, the sweep ends as the one that was left in peace."""
    peaceful = Sweep(sweep_config(name="peaceful", trials=2)).run().leaderboard
    config, begun = sweep_config(trials=2), list[int]()

    def leave(_trainer: Trainer, plan: Any) -> None:
        begun.append(plan.number)
        if begun == [1, 2, 1]:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        before_step(patch, leave)
        with pytest.raises(InterruptedRunError, match="the sweep resumes this trial") as caught:
            Sweep(config).run()
    assert caught.value.exit_code == 130
    folder = Path(config.output.base_output_dir) / "sweeps/sweep"
    states = [row["state"] for row in json.loads((folder / "leaderboard.json").read_text())["rows"]]
    assert states == ["finished", "stopped"] and (folder / "best.yaml").is_file()

    shown: list[TrialRow] = []
    config.training.micro_batch_tokens = 512  # free to differ: the run takes this process's
    used = set[int]()
    before_step(monkeypatch, lambda trainer, _: used.add(trainer.settings.micro_batch_tokens))
    board = Sweep(config, on_trial=shown.append).run().leaderboard
    assert [row.trial for row in shown] == [1] and used == {512}
    log = (Path(shown[0].run_dir or "") / "logs/run.log").read_text()
    assert "resuming after step 1 of 2" in log
    (ours, theirs) = (outcomes(found) for found in (board, peaceful))
    assert [params for params, _ in ours] == [params for params, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-5)


@pytest.mark.slow
def test_results_are_read_when_nobody_else_writes_them(sweep_config: Config) -> None:
    """A process that waits for another's writing says of the trials what holds then, not what held before."""
    config = sweep_config(trials=1)
    mine, theirs = Sweep(config), Sweep(config)
    writing = Event()

    def end() -> None:
        with FileLock(mine.folder / "results.lock"):
            writing.set()
            time.sleep(0.2)
            theirs.study.end_trial(trial, TrialState.COMPLETE, 1.0)
            theirs.study.close()  # this thread's connection

    with Worker(mine.folder / "workers") as worker:
        trial = theirs.study.claim_trial(worker)
        assert trial is not None
        other = Thread(target=end)
        other.start()
        writing.wait()
        assert [row.state for row in mine._write_results().leaderboard.rows] == ["finished"]
        other.join()
    for sweep in (mine, theirs):
        sweep.study.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_trials_last_step_ends_the_sweep(
    sweep_config: Config, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before_step(monkeypatch, lambda _, plan: os.kill(os.getpid(), number) if plan.number == 2 else None)
    shown: list[TrialRow] = []
    with pytest.raises(InterruptedRunError, match="Start the same command again") as caught:
        Sweep(sweep_config(trials=2), on_trial=shown.append).run()
    assert caught.value.exit_code == 128 + number
    assert [row.state for row in shown] == ["finished"]


@pytest.mark.slow
def test_a_trial_whose_process_died_twice_has_failed(sweep_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_trainer: Trainer, _plan: Any) -> None:
        os._exit(9)  # as the out-of-memory killer: nothing is said or saved

    config, lengths = sweep_config(trials=1), list[int]()
    with monkeypatch.context() as patch:
        before_step(patch, die)
        for _ in range(2):
            child = os.fork()
            if not child:
                with suppress(BaseException):
                    Sweep(config).run()
                os._exit(0)
            lengths.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert lengths == [9, 9]
    board = Sweep(config).run().leaderboard
    assert [row.state for row in board.rows] == ["failed"] and "died twice" in (board.rows[0].error or "")


@pytest.mark.slow
def test_a_run_that_another_process_holds_is_no_failure(sweep_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep_config(trials=1)
    with monkeypatch.context() as patch:
        before_step(patch, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(InterruptedRunError):
            Sweep(config).run()
    (run,) = runs_folder(config.output.base_output_dir, "sweep").iterdir()
    with (
        RunFolder(run).hold_lock(),
        pytest.raises(TrainingError, match=r"trial-0000-\w+: .*another process.* no failure"),
    ):
        Sweep(config).run()
    assert [row.state for row in Sweep(config).run().leaderboard.rows] == ["finished"]


@pytest.mark.slow
def test_a_full_disk_is_no_failure_of_a_trial(sweep_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_trainer: Trainer, _plan: Any) -> None:
        raise OSError(28, "No space left on device")

    config = sweep_config(trials=1)
    with monkeypatch.context() as patch:
        before_step(patch, full)
        with pytest.raises(TrainingError, match="No space left on device"):
            Sweep(config).run()
    assert [row.state for row in Sweep(config).run().leaderboard.rows] == ["finished"]


@pytest.mark.parametrize("changed", slow_but(["train"], ["train", "validation"]))
def test_rows_that_changed_are_another_question(sweep_config: Config, write_rows: WriteRows, changed: str) -> None:
    rows = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(16)]
    config = sweep_config(training={"max_steps": 1})
    config.data.train = [str(write_rows(rows[:8], "train.jsonl"))]
    config.data.validation = [str(write_rows(rows[8:], "validation.jsonl"))]
    Sweep(config).study.close()
    write_rows([{"question": "Who?", "answer": "She."}, {"question": "What?", "answer": "It."}], f"{changed}.jsonl")
    with pytest.raises(ConfigurationError, match=rf"the rows of data\.{changed}: the study 'sweep' has '\w+', given"):
        Sweep(config)


@pytest.mark.slow
def test_a_hopeless_trial_is_pruned(sweep_config: Config) -> None:
    config = sweep_config(
        training={"max_steps": 3, "eval_steps": 1},
        space={"training.lr": [1e-2, 1e-6]},
        pruner="successive_halving",
        sampler="grid",
        seed=3,
    )
    shown: list[TrialRow] = []
    board = Sweep(config, on_trial=shown.append).run().leaderboard
    states = {row.params["training.lr"]: row.state for row in shown}
    assert shown[0].state == "finished" and states[1e-6] == "pruned"  # the default settings are never pruned
    pruned = board.rows[-1]
    run = RunFolder(Path(pruned.run_dir or ""))
    assert pruned.params == {"training.lr": 1e-6}
    assert run.status == "pruned" and not run.adapter.exists()


def test_trials_have_ids_of_their_own(sweep_config: Config) -> None:
    config = sweep_config()
    config.output.run_id = "mine"
    with pytest.raises(ConfigurationError, match=r"output\.run_id: every trial"):
        Sweep(config)


def test_a_sweep_needs_validation_rows(sweep_config: Config) -> None:
    config = sweep_config()
    config.data.validation = None
    with pytest.raises(ConfigurationError, match=r"sweep\.metric: .* set data\.validation or data\.val_ratio"):
        Sweep(config)
