"""Sweeps of several machines on a real PostgreSQL server: each trial once, whatever dies, sleeps or starts at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, can_rename_hosts
from optuna.trial import TrialState
from typer.testing import CliRunner

from training_lens.cli import cli
from training_lens.config.compose import validate_values
from training_lens.config.schema import TrainingConfig
from training_lens.sweeps.space import Space
from training_lens.sweeps.study import SharedStudy
from training_lens.sweeps.worker import Worker

pytestmark = pytest.mark.distributed
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed (make setup)")

from postgresql_server import PostgresServer, find_programs, run_server  # noqa: E402

TRIALS = 6
TAKEOVER = 5  # seconds
STEPS = 60  # of a trial
ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(32)]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (make test-distributed)")
    if not can_rename_hosts():
        pytest.skip("host names of their own take the rights of root")
    with run_server(programs) as running:
        yield running


@pytest.fixture
def storage(server: PostgresServer, tmp_path: Path) -> Iterator[str]:
    """The URL of a new database. Nothing that the test's machines write or print has its password."""
    yield server.url(server.create_database())
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if server.secret.encode() in file.read_bytes()] == []


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[str]:
    """The command of all machines, without its storage: a sweep of `TRIALS` trials of `STEPS` steps."""
    data = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS[:24]), ("validation", ROWS[24:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "sweep",
        f"model.id={tiny_base}",
        *(f"data.{name}={data / name}.jsonl" for name in ("train", "validation")),
        f"training.max_steps={STEPS}",
        "training.eval_steps=12",
        "peft.r=4",
        "lens.enabled=false",
        "tracking.tensorboard=false",
        "tracking.samples=0",
        "sweep.space.training.lr={low: 1e-4, high: 1e-2, log: true}",
        f"sweep.trials={TRIALS}",
        "sweep.sampler=random",
        f"sweep.takeover_seconds={TAKEOVER}",
    ]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The trials of one process that nothing disturbs: this one, so that its forks have what a sweep imports."""
    folder = tmp_path_factory.mktemp("alone")
    result = CliRunner().invoke(cli, [*words, f"output.base_output_dir={folder}"])
    assert result.exit_code == 0, result.output
    return read_leaderboard(folder)


def read_leaderboard(outputs: Path) -> list[Row]:
    rows: list[Row] = json.loads((outputs / "sweeps/sweep/leaderboard.json").read_text())["rows"]
    return rows


def results(rows: list[Row]) -> list[tuple[str, str, float]]:
    """What must not depend on who ran a trial."""
    return sorted((row["state"], str(row["params"]), row["validation_loss"]) for row in rows)


def list_runs(machine: Machine) -> list[str]:
    return sorted(run.name for run in (machine.outputs / "experiments/sweep/runs").iterdir())


def wait_for_checkpoint(machine: Machine, process: BaseProcess, outputs: Path) -> None:
    """Until the machine is in the middle of its first trial."""
    while not list(outputs.glob("experiments/sweep/runs/*/checkpoints/step-*/manifest.json")):
        assert process.is_alive(), machine.stderr
        time.sleep(0.005)
    assert "trial" not in machine.stdout


def ended_trials(*machines: Machine) -> list[str]:
    """The first words of the lines that say which trials ended, of all machines."""
    lines = [line for machine in machines for line in machine.stdout.splitlines()]
    return sorted(line.partition(":")[0].partition(" (")[0] for line in lines if line.startswith("trial "))


def test_two_machines_do_each_trial_once_and_the_trials_of_one_process(
    words: list[str], storage: str, alone: list[Row], tmp_path: Path
) -> None:
    """They share the database alone. Their clocks are in other time zones, as is the server's."""
    north = Machine(tmp_path / "north", "north", "Asia/Tokyo")
    south = Machine(tmp_path / "south", "south", "America/New_York")
    command = [*words, f"sweep.storage={storage}"]
    processes = [machine.start(*command) for machine in (north, south)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], north.stderr + south.stderr
    apart = [list_runs(north), list_runs(south)]
    assert all(apart) and len({*apart[0], *apart[1]}) == len(ended_trials(north, south)) == TRIALS

    for machine in (north, south):  # nothing is left: both write the whole result
        assert machine.run(*command) == 0 and not ended_trials(machine)
        rows = read_leaderboard(machine.outputs)
        assert results(rows) == results(alone) and {row["host"] for row in rows} == {"north", "south"}
    assert "machine" in south.stdout and [list_runs(north), list_runs(south)] == apart
    assert (north.outputs / "sweeps/sweep/best.yaml").read_text() == (
        south.outputs / "sweeps/sweep/best.yaml"
    ).read_text()


def test_a_killed_machine_is_replaced_and_its_run_continues_where_the_files_are_shared(
    words: list[str], storage: str, alone: list[Row], tmp_path: Path
) -> None:
    """First the other trials, then, when its heartbeat has stopped for long enough, the dead machine's."""
    command = [*words, f"sweep.storage={storage}", f"output.base_output_dir={tmp_path / 'shared'}"]
    north, south = (Machine(tmp_path / name, name) for name in ("north", "south"))
    killed = north.start(*command)
    wait_for_checkpoint(north, killed, tmp_path / "shared")
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert south.run(*command) == 0, south.stderr
    ended = [line.partition(":")[0] for line in south.stdout.splitlines() if line.startswith("trial ")]
    assert ended[0] == "trial 1" and "trial 0 (default settings)" in ended[1:] and len(ended) == TRIALS
    rows = read_leaderboard(tmp_path / "shared")
    assert results(rows) == results(alone) and {row["host"] for row in rows} == {"south"}
    (first,) = (tmp_path / "shared/experiments/sweep/runs").glob("trial-0000-*/logs/run.log")
    assert "resuming after step" in first.read_text()


def test_a_machine_that_slept_too_long_goes_on_without_its_trial(
    words: list[str], storage: str, alone: list[Row], tmp_path: Path
) -> None:
    """Its trial counts once, that of the machine which took it over (optuna#5470)."""
    command = [*words, f"sweep.storage={storage}"]
    north, south = (Machine(tmp_path / name, name) for name in ("north", "south"))
    asleep = north.start(*command)
    wait_for_checkpoint(north, asleep, north.outputs)
    os.kill(asleep.pid or 0, signal.SIGSTOP)
    try:
        code = south.run(*command)
    finally:
        os.kill(asleep.pid or 0, signal.SIGCONT)
    asleep.join()
    assert code == 0, south.stderr
    assert asleep.exitcode == 0 and "was taken over by another process" in north.stdout, north.stderr
    assert "trial 0 (default settings): stopped  " in north.stdout
    rows = read_leaderboard(north.outputs)
    assert results(rows) == results(alone) and {row["host"] for row in rows} == {"south"}
    assert len(list_runs(south)) == TRIALS and len(list_runs(north)) == 1


def test_a_server_that_stops_ends_the_sweep_in_one_paragraph_and_it_continues_when_the_server_is_back(
    words: list[str], storage: str, alone: list[Row], server: PostgresServer, tmp_path: Path
) -> None:
    north, command = Machine(tmp_path / "north", "north"), [*words, f"sweep.storage={storage}"]
    process = north.start(*command)
    wait_for_checkpoint(north, process, north.outputs)
    server.stop()
    try:
        process.join()
        assert process.exitcode == 1
        (said,) = north.stderr.splitlines()
        assert said.startswith("error: the storage of the sweep 'sweep' (postgresql://admin@127.0.0.1:")
        assert "connection" in said and "start the same command again" in said and "Traceback" not in north.stdout
        assert north.run(*command) == 2 and "cannot be opened" in north.stderr  # not yet
    finally:
        server.start()
    assert north.run(*command) == 0, north.stderr
    assert results(read_leaderboard(north.outputs)) == results(alone) and len(list_runs(north)) == TRIALS
    (first,) = north.outputs.glob("experiments/sweep/runs/trial-0000-*/logs/run.log")
    assert "resuming after step" in first.read_text()


def test_six_machines_that_start_at_once_share_one_study(
    words: list[str], storage: str, alone: list[Row], tmp_path: Path
) -> None:
    command = [*words, f"sweep.storage={storage}"]
    machines = [Machine(tmp_path / f"m{i}", f"m{i}") for i in range(6)]
    processes = [machine.start(*command) for machine in machines]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6, [machine.stderr for machine in machines]
    assert len(ended_trials(*machines)) == len(set(ended_trials(*machines))) == TRIALS
    assert machines[0].run(*command) == 0
    assert results(read_leaderboard(machines[0].outputs)) == results(alone)


def test_a_storage_that_cannot_be_used_is_refused_in_one_paragraph(
    words: list[str], storage: str, server: PostgresServer, tmp_path: Path
) -> None:
    database = storage.rpartition("/")[2]
    with closing(socket.create_server(("127.0.0.1", 0))) as silent, closing(socket.socket()) as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        mute, unused = (f"127.0.0.1:{end.getsockname()[1]}" for end in (silent, closed))
        wrong = {
            server.url(database, at=unused): "Connection refused",
            server.url(database, at=f"127.0.0.2:{server.port}"): "Connection refused",
            f"{server.url(database, at=mute)}?connect_timeout=2": "timeout",
            server.url(database, password=f"{server.secret}x"): "password authentication failed",
            server.url("nothing"): 'database "nothing" does not exist',
            storage.replace("%40", "@", 1): "Write %40",
            storage.replace(":", "+pg8000:", 1): "its driver is not installed",
            storage.replace("127.0.0.1:", "127.0.0.1:x"): "has not the form",
        }
        machines = [Machine(tmp_path / str(i), "north") for i in range(len(wrong))]
        processes = [
            machine.start(*words, f"sweep.storage={url}") for machine, url in zip(machines, wrong, strict=True)
        ]
        for process, machine, reason in zip(processes, machines, wrong.values(), strict=True):
            process.join()
            (said,) = machine.stderr.splitlines()
            assert process.exitcode == 2 and said.startswith("error: sweep.storage: ") and reason in said
            assert not (machine.outputs / "experiments").exists()


def build_config(trials: int, storage: str | None = None) -> TrainingConfig:
    space = {"training.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    return validate_values({"sweep": {"space": space, "sampler": "random", "trials": trials, "storage": storage}})


def claim_all(config: TrainingConfig, folder: Path, barrier: Any = None) -> None:
    """A process that ends each trial as soon as it has claimed it; `ended` has a line for each."""
    if barrier:
        barrier.wait()
    study = SharedStudy(config, Space.from_config(config), folder, {}, {"training.lr": 3e-3})
    with Worker(folder / "workers") as worker, (folder / "ended").open("a") as ended:
        while (trial := study.claim_trial(worker)) is not None:
            study.end_trial(trial, TrialState.COMPLETE, trial.params["training.lr"])
            print(trial.user_attrs.get("continues", trial.number), trial.params["training.lr"], file=ended)
    study.close()


def test_claims_of_many_processes_at_once_are_those_of_one(
    storage: str, server: PostgresServer, tmp_path: Path
) -> None:
    """They create tables and study, claim, and take over the trials of a dead machine at once (optuna#4862)."""
    forked = multiprocessing.get_context("fork")

    def claim_by_six(config: TrainingConfig, name: str) -> list[str]:
        barrier, folders = forked.Barrier(6), [tmp_path / f"{name}{i}" for i in range(6)]
        for folder in folders:
            folder.mkdir()
        processes = [forked.Process(target=claim_all, args=(config, folder, barrier)) for folder in folders]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 6
        return [line for folder in folders for line in (folder / "ended").read_text().splitlines()]

    claim_all(build_config(28), tmp_path)
    points = Counter(line.split()[1] for line in (tmp_path / "ended").read_text().splitlines())
    ended = claim_by_six(build_config(20, storage), "early")
    assert len({line.split()[0] for line in ended}) == len(ended) == 20

    study = SharedStudy(dead := build_config(28, storage), Space.from_config(dead), tmp_path, {})
    with Worker(tmp_path / "workers") as worker:
        worker.host = "dead"
        for _ in range(8):
            study.claim_trial(worker)
    study.close()
    with server.connect(storage.rpartition("/")[2]) as connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour'")
    late = claim_by_six(dead, "late")
    assert len({line.split()[0] for line in late}) == len(late) == 8
    assert Counter(line.split()[1] for line in ended + late) == points


def test_a_connection_that_was_closed_between_two_uses_is_opened_again(
    storage: str, server: PostgresServer, tmp_path: Path
) -> None:
    """As a firewall closes those that wait for hours, or a server that restarts."""
    config = build_config(1, storage)
    study = SharedStudy(config, Space.from_config(config), tmp_path, {})
    with server.connect() as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    with Worker(tmp_path / "workers") as worker:
        assert study.claim_trial(worker) is not None
    study.close()
