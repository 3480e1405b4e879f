"""A shared study: exactly as many trials as wanted, none twice, and what a dead process left is gone on with."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads
from typing import Literal

import optuna
import pytest
from forked import fork  # type: ignore[import-not-found]
from optuna.distributions import FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event, text

from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.sweeps.leaderboard import build_leaderboard
from training_lens.sweeps.space import Space
from training_lens.sweeps.study import SharedStudy
from training_lens.sweeps.trials import current_trials, is_default, is_valid_claim, run_id
from training_lens.sweeps.worker import Worker, is_alive, send_heartbeats

Config = Callable[..., TrainingConfig]
Open = Callable[..., SharedStudy]


def states(study: SharedStudy, config: TrainingConfig) -> list[str]:
    return [row.state for row in build_leaderboard("s", "m", study.current_trials(), Space.from_config(config)).rows]


def claimed(study: SharedStudy, worker: Worker) -> FrozenTrial:
    claim = study.claim_trial(worker)
    assert claim is not None
    return claim


def last_heard(study: SharedStudy, minutes_ago: int) -> None:
    """Moves every pulse in the database back in time."""
    with study._storage.engine.begin() as connection:
        connection.execute(text(f"update trial_heartbeats set heartbeat = datetime('now', '-{minutes_ago} minutes')"))


def refuse_updates(_connection: object, _cursor: object, statement: str, *_: object) -> None:
    if statement.startswith("UPDATE"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_processes_share_exactly_the_trials_wanted(sweep_config: Config, open_study: Open, tmp_path: Path) -> None:
    config = sweep_config(space={"peft.r": [2, 4, 8, 16, 32]}, trials=4)
    with Worker(tmp_path) as one, Worker(tmp_path) as two:
        a, b = open_study(config), open_study(config)
        running = [claimed(study, worker) for study, worker in [(a, one), (b, two), (a, one), (b, two)]]
        assert a.claim_trial(one) is None and b.claim_trial(two) is None
        assert len({trial.params["peft.r"] for trial in running}) == 4
        for trial in running:
            b.end_trial(trial, TrialState.COMPLETE, 1.0 / (1 + trial.number))
        assert a.claim_trial(one) is None and states(a, config) == ["finished"] * 4


def test_of_claims_made_at_once_the_lowest_number_stands(
    sweep_config: Config, open_study: Open, tmp_path: Path
) -> None:
    """Both processes read the study before either wrote its claim."""
    config = sweep_config(space={"peft.r": [2, 4]}, trials=2)
    study = open_study(config)
    with Worker(tmp_path) as worker:
        first, same, other = (study._create_trial({"peft.r": r}, worker) for r in (2, 2, 4))
        everything = [first, same, other]
        assert [is_valid_claim(claim, everything, wanted=3) for claim in everything] == [True, False, True]
        assert [is_valid_claim(claim, everything, wanted=1) for claim in everything] == [True, False, False]
        assert [t.number for t in current_trials(everything)] == [first.number, other.number]  # withdrawn or not yet
        study._end_trial(first, TrialState.FAIL)  # two processes then go on with the run of one that was left
        left = study.read_trial(first)
        again = [study._create_trial(left.params, worker, left) for _ in range(2)]
        assert [is_valid_claim(claim, [left, same, other, *again], wanted=3) for claim in again] == [True, False]
        assert {run_id(claim) for claim in again} == {run_id(first)}
        assert [t.number for t in current_trials([left, *again])] == [again[0].number]


def test_what_a_killed_process_left_is_gone_on_with_at_once(
    sweep_config: Config, open_study: Open, tmp_path: Path
) -> None:
    config = sweep_config(trials=1)
    study = open_study(config)
    reader, writer = os.pipe()

    def hold_lock() -> None:
        with Worker(tmp_path / "workers") as worker:
            os.write(writer, bytes(worker.path))
            signal.pause()

    child = fork(hold_lock)
    with Worker(tmp_path / "workers") as mine:
        lock = Path(os.fsdecode(os.read(reader, 1000)))
        theirs = study._create_trial({"training.lr": 1e-3}, mine)
        study._storage.set_trial_user_attr(study._trial_id(theirs), "lock", str(lock))
        study.report_loss(theirs, 1, 0.5)
        assert study.claim_trial(mine) is None and is_alive(mine.trial_attributes)
        child.kill()
        child.join()
        again = claimed(study, mine)
        assert run_id(again) == run_id(theirs) and again.params == theirs.params
        assert again.intermediate_values == {1: 0.5}
        assert not lock.exists() and study.claim_trial(mine) is None
    for descriptor in (reader, writer):
        os.close(descriptor)


def test_a_trial_is_lost_again_where_its_loss_could_not_be_written(
    sweep_config: Config, open_study: Open, tmp_path: Path
) -> None:
    study = open_study(sweep_config(trials=1))
    with pytest.raises(RuntimeError), Worker(tmp_path / "workers") as dead:
        theirs = claimed(study, dead)
        raise RuntimeError("a crash")
    with Worker(tmp_path / "workers") as mine:
        event.listen(study._storage.engine, "before_cursor_execute", refuse_updates)
        with pytest.raises(OSError, match="No space left"):
            study.claim_trial(mine)
        event.remove(study._storage.engine, "before_cursor_execute", refuse_updates)
        assert run_id(claimed(study, mine)) == run_id(theirs)
        assert not dead.path.exists()


def test_a_process_of_another_machine_is_dead_when_its_heartbeat_stops(
    sweep_config: Config, open_study: Open, tmp_path: Path
) -> None:
    study = open_study(sweep_config(trials=1))
    with Worker(tmp_path) as worker:
        worker.host = "elsewhere"
        theirs = claimed(study, worker)
        worker.host = "here"
        assert is_alive(theirs.user_attrs) is None and study.claim_trial(worker) is None
        last_heard(study, minutes_ago=10)
        with study.send_heartbeats(theirs):
            assert study.claim_trial(worker) is None
        last_heard(study, minutes_ago=4)
        assert study.claim_trial(worker) is None
        last_heard(study, minutes_ago=6)
        assert run_id(claimed(study, worker)) == run_id(theirs)


def test_heartbeats_go_on_while_the_database_is_away(tmp_path: Path) -> None:
    class Away(RDBStorage):
        """Fails at each second heartbeat."""

        def record_heartbeat(self, trial_id: int) -> None:
            heard.append(trial_id)
            if len(heard) == 4:
                enough.set()
            if len(heard) % 2 == 0:
                raise StorageInternalError("away")

    heard, enough = list[int](), Event()
    with send_heartbeats(Away(f"sqlite:///{tmp_path / 'study.db'}"), 7, every=0.001):
        assert enough.wait(60)
    assert set(heard) == {7} and "sweep-heartbeat" not in {thread.name for thread in enumerate_threads()}


@pytest.mark.slow
def test_a_process_that_stands_still_keeps_its_trial(sweep_config: Config, open_study: Open, tmp_path: Path) -> None:
    study = open_study(sweep_config(trials=1))
    with Worker(tmp_path / "workers") as suspended, Worker(tmp_path / "workers") as mine:
        theirs = claimed(study, suspended)
        last_heard(study, minutes_ago=10)
        assert study.claim_trial(mine) is None
        study.end_trial(theirs, TrialState.COMPLETE, 1.0)
        assert study.read_trial(theirs).value == 1.0


def test_a_trial_that_a_process_left_by_an_error_is_gone_on_with_at_once(
    sweep_config: Config, open_study: Open, tmp_path: Path
) -> None:
    study = open_study(sweep_config(trials=1))
    with pytest.raises(RuntimeError), Worker(tmp_path / "workers") as worker:
        theirs = claimed(study, worker)
        raise RuntimeError
    with Worker(tmp_path / "workers") as mine:
        assert run_id(claimed(study, mine)) == run_id(theirs)


def test_deaths_are_counted_and_interrupts_are_none(sweep_config: Config, open_study: Open, tmp_path: Path) -> None:
    study = open_study(sweep_config(trials=1))
    with Worker(tmp_path / "workers") as worker:
        for deaths in (0, 1, 2):
            study.release_trial(claimed(study, worker))
            trial = claimed(study, worker)
            assert study.count_deaths(trial) == deaths
            study._end_trial(trial, TrialState.FAIL)  # as of a process found dead


def test_a_lock_that_cannot_be_read_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(tmp_path) as worker:
        monkeypatch.setattr("os.open", denied)
        assert is_alive(worker.trial_attributes) is None


def denied(path: object, *_: object) -> int:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.slow
def test_stopped_trials_stay_where_enough_have_ended(sweep_config: Config, open_study: Open, tmp_path: Path) -> None:
    config = sweep_config(trials=2)
    study = open_study(config)
    with Worker(tmp_path) as worker:
        study.end_trial(claimed(study, worker), TrialState.COMPLETE, 1.0)
        study.release_trial(claimed(study, worker))
        fewer = open_study(sweep_config(trials=1))
        assert fewer.claim_trial(worker) is None and states(study, config) == ["finished", "stopped"]


@pytest.mark.slow
def test_failed_trials_count_and_are_not_tried_again(sweep_config: Config, open_study: Open, tmp_path: Path) -> None:
    config = sweep_config(space={"peft.r": [2, 4, 8]}, trials=2)
    study = open_study(config)
    with Worker(tmp_path) as worker:
        study.end_trial(claimed(study, worker), TrialState.FAIL, error="out of memory.")
        study.end_trial(claimed(study, worker), TrialState.COMPLETE, 1.0, seconds=2.0)
        assert study.claim_trial(worker) is None and states(study, config) == ["finished", "failed"]
        more = open_study(sweep_config(space={"peft.r": [2, 4, 8]}, trials=9))
        more.end_trial(claimed(more, worker), TrialState.COMPLETE, 0.5)
        assert more.claim_trial(worker) is None  # the space is tried whole
        assert len({trial.params["peft.r"] for trial in more.current_trials()}) == 3


def test_another_config_or_space_is_refused_with_the_difference(sweep_config: Config, open_study: Open) -> None:
    open_study(sweep_config())
    open_study(sweep_config(trials=9, seed=3, training={"logging_steps": 3}))  # these may differ
    with pytest.raises(ConfigurationError) as caught:
        open_study(sweep_config(space={"peft.r": [4]}, training={"weight_decay": 0.5}))
    said = str(caught.value)
    assert "training.weight_decay: the study 'sweep' has 0.0, given 0.5" in said
    assert "sweep.space: the study 'sweep' has" in said and "give another sweep.name" in said


def test_other_rows_are_refused(sweep_config: Config, open_study: Open) -> None:
    open_study(sweep_config(), train="a1", validation="b1")
    with pytest.raises(ConfigurationError, match="the rows of validation: the study 'sweep' has 'b1', given 'b2'"):
        open_study(sweep_config(), train="a1", validation="b2")


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_study_of_another_program_is_left_alone(
    sweep_config: Config, open_study: Open, tmp_path: Path, direction: Literal["maximize", "minimize"]
) -> None:
    storage = f"sqlite:///{tmp_path / 'theirs.db'}"
    theirs = optuna.create_study(storage=storage, study_name="sweep", direction=direction)
    theirs.tell(theirs.ask({"x": FloatDistribution(0, 1)}), 0.5)
    with pytest.raises(ConfigurationError, match=r"sweep\.name: .* not a sweep of Training Lens"):
        open_study(sweep_config(storage=storage))
    assert len(theirs.get_trials()) == 1 and not theirs.user_attrs


@pytest.mark.slow
def test_the_database_is_in_the_folder_whatever_its_name(sweep_config: Config, tmp_path: Path) -> None:
    config = sweep_config()
    for name in ("a?b=1", "a%41", "a#b", "{a}"):
        folder = tmp_path / name
        folder.mkdir()
        SharedStudy(config, Space.from_config(config), folder, {}).close()
        assert (folder / "study.db").is_file()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(sweep_config: Config, open_study: Open, url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"sweep\.storage: .* in memory"):
        open_study(sweep_config(storage=url))


def test_a_storage_that_cannot_be_opened_is_named_without_its_password(sweep_config: Config, open_study: Open) -> None:
    unclear = "postgresql://me:it@secret@host/db", "postgresql://me:it@secret:5432/db:x@host/db"
    for url in ("sqlite:////no/such/folder/study.db", "mysql+nosuch://me:secret@localhost/db", "me:secret", *unclear):
        with pytest.raises(ConfigurationError, match=r"sweep\.storage: .* cannot be opened") as caught:
            open_study(sweep_config(storage=url))
        assert "secret" not in str(caught.value)


DEFAULT = {"training.lr": 3e-3}


def test_the_default_settings_are_tried_first_and_once(sweep_config: Config, tmp_path: Path) -> None:
    """By one of the processes; where it dies, the next goes on with them."""
    config = sweep_config(trials=3)
    study = SharedStudy(config, Space.from_config(config), tmp_path, {}, DEFAULT)
    with Worker(tmp_path / "workers") as worker:
        first, second = claimed(study, worker), claimed(study, worker)
        assert (first.params, first.user_attrs["default"]) == (DEFAULT, DEFAULT) and not is_default(second)
        study.keep_losses(first, [1.0, 2.0])
        study.release_trial(first)
        again = claimed(study, worker)
        assert run_id(again) == run_id(first) and is_default(again) and again.user_attrs["block_nll"] == [1.0, 2.0]
        study.end_trial(again, TrialState.COMPLETE, 1.0)
        study.end_trial(second, TrialState.COMPLETE, 2.0)
        assert not is_default(claimed(study, worker))
    study.close()


def test_a_study_of_an_earlier_version_goes_on_without_them(
    sweep_config: Config, open_study: Open, tmp_path: Path
) -> None:
    config = sweep_config(trials=3)
    earlier = open_study(config)
    noted = earlier._study.user_attrs["config"]
    lacking = {key: value for key, value in noted.items() if key not in ("training.warmup_steps", "data.csv")}
    earlier._study.set_user_attr("config", lacking)
    study = SharedStudy(config, Space.from_config(config), tmp_path, {}, DEFAULT)
    with Worker(tmp_path / "workers") as worker:
        assert not is_default(claimed(study, worker))
    study.close()


def test_a_study_from_outside_names_no_folder_and_no_file(tmp_path: Path) -> None:
    trial = create_trial(value=1.0, user_attrs={"token": "../../../../precious"})
    with pytest.raises(ConfigurationError, match="cannot name a folder"):
        run_id(trial)
    for name in ("thesis.tex", f"{socket.gethostname()}-1-abcd.lock"):
        precious = tmp_path / name
        precious.write_text("mine")
        assert is_alive({"host": socket.gethostname(), "lock": str(precious)}) is None
        assert precious.read_text() == "mine"
