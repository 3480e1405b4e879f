"""Output that goes away: a reader that leaves, a full disk, closed descriptors, a terminal that hangs up."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import fork_command  # type: ignore[import-not-found]

from training_lens.utils.logging import TrainingLogger, get_logger, setup_logging
from training_lens.utils.streams import BestEffortFile

TRAIN = [
    "train",
    "training.max_steps=3",
    "training.batch_size=4",
    "training.warmup_ratio=0",
    "training.logging_steps=1",
]
FEW = ["data.max_examples=16", "tracking.samples=0", "tracking.tensorboard=false", "lens.enabled=false"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "training_lens", *args]


def start(folder: Path, rows: dict[str, list[str]], redirect: Callable[[], None]) -> BaseProcess:
    folder.mkdir()
    return fork_command(folder, *TRAIN, *FEW, f"data.train={rows['train'][0]}", redirect=redirect)


def leave(folder: Path, rows: dict[str, list[str]]) -> BaseProcess:
    """The reader leaves after the first bytes, the disk under standard error is full, and there is no input."""
    reader, writer = os.pipe()

    def redirect() -> None:
        os.dup2(writer, 1)
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        for number in (0, reader, writer):
            os.close(number)

    process = start(folder, rows, redirect)
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    return process


def hang_up(folder: Path, rows: dict[str, list[str]]) -> BaseProcess:
    """The terminal hangs up once something was shown on it: the kernel sends SIGHUP, and writing fails."""
    master, terminal = pty.openpty()

    def redirect() -> None:
        os.close(master)
        os.login_tty(terminal)  # the terminal controls the process, as it does a shell's

    process = start(folder, rows, redirect)
    os.close(terminal)
    os.read(master, 10)
    os.close(master)
    return process


@pytest.mark.slow
def test_a_run_trains_on_without_anybody_to_tell(tmp_path: Path, few_rows: dict[str, list[str]]) -> None:
    started = {way.__name__: way(tmp_path / way.__name__, few_rows) for way in (leave, hang_up)}
    for name, process in started.items():
        process.join(200)
        assert process.exitcode == 0, name
        (run,) = (tmp_path / name).glob("outputs/experiments/default/runs/*")
        assert json.loads((run / "metadata" / "summary.json").read_text())["status"] == "finished"
        assert "step 3/3" in (run / "logs" / "run.log").read_text()


def test_what_is_printed_gets_into_no_file_that_takes_a_closed_descriptor(tmp_path: Path) -> None:
    def close_all() -> None:
        os.closerange(0, 3)

    written = []
    for streams in ({"stdout": subprocess.DEVNULL}, {"preexec_fn": close_all}):
        assert subprocess.run(command("init"), cwd=tmp_path, **streams).returncode == 0
        written.append((tmp_path / "config.yaml").read_text())
        (tmp_path / "config.yaml").unlink()
    assert written[0] == written[1]


def test_a_result_that_is_lost_is_an_error_but_a_reader_who_had_enough_is_none(tmp_path: Path) -> None:
    listed = command("experiment", "list", "--json")
    with Path("/dev/full").open("wb") as full:
        lost = subprocess.run(listed, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert lost.returncode == 1
    assert "\nerror: standard output could not be written (No space left on device)" in lost.stderr
    assert len(lost.stderr.strip().splitlines()) == 2  # what is told, and the error
    reader, writer = os.pipe()
    os.close(reader)
    left = subprocess.run(listed, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (left.returncode, left.stderr) == (0, "no such runs in outputs\n")


def test_a_file_that_lasts_takes_up_again_when_there_is_room(tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    file = BestEffortFile(descriptor, "w")
    assert file.write(b"lost") == 4 and file.lost is not None
    os.dup2(os.open(tmp_path / "room", os.O_WRONLY | os.O_CREAT), descriptor)
    assert file.write(b"kept") == 4
    file.close()
    assert (tmp_path / "room").read_bytes() == b"kept"


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(["wc", "-c"], stdin=reader, stdout=subprocess.PIPE) as counting:
        os.close(reader)
        with BestEffortFile(writer, "w") as file:
            sent = sum(file.write(b"x" * 50_000) for _ in range(20))
        assert counting.stdout is not None and int(counting.stdout.read()) == sent


def test_a_full_disk_under_run_log_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    (tmp_path / "run.log").symlink_to("/dev/full")
    with TrainingLogger(tmp_path / "run.log"):
        for number in range(3):
            get_logger("example").info("line %d", number)
    told = "".join(capfd.readouterr().err.splitlines())
    assert told.count("lacks lines") == 1 and "line 2" in told and "Logging error" not in told


def test_a_screen_that_is_closed_is_no_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    screen = (tmp_path / "screen").open("w")
    setup_logging(Console(file=screen))
    screen.close()
    get_logger("example").warning("nobody reads this")
    logging.getLogger("training_lens").handlers.clear()
    assert capfd.readouterr().err == ""
