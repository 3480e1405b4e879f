"""`training-lens watch`: it fits its terminal while a real run trains, ends as the run ends, and never touches it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from forked import fork_command  # type: ignore[import-not-found]
from terminal_screen import Terminal, TerminalScreen  # type: ignore[import-not-found]

from training_lens.runs.run_folder import RunFolder, runs_folder

Call = Callable[..., Result]
SMALL = (
    "peft.r=4",
    "training.batch_size=8",
    "training.eval_steps=4",
    "tracking.tensorboard=false",
    "lens.report=false",
)
LAST_LINE = "q ends"  # of a frame


@pytest.fixture
def settings(few_rows: dict[str, list[str]], tiny_base: Path) -> list[str]:
    """Of a run of 12 steps with 3 validations, in the default output folder."""
    data = [f"data.{split}={files[0]}" for split, files in few_rows.items()]
    return [
        f"model.id={tiny_base}",
        *data,
        "data.max_examples=96",
        "training.epochs=1",
        *SMALL,
        "output.run_id=mine",
        "lens.flush_seconds=0.1",
    ]


@pytest.fixture
def mine(tmp_path: Path) -> RunFolder:
    return RunFolder(runs_folder(str(tmp_path / "outputs"), "default") / "mine")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 80 columns and 24 lines."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    opened = Terminal(80, 24)
    yield opened
    opened.close()


@pytest.fixture
def running(finished_run: RunFolder, mine: RunFolder) -> Iterator[RunFolder]:
    """A run that looks as if it trained: a copy of a finished one, locked by this process."""
    shutil.copytree(finished_run.root, mine.root)
    mine.write_metadata("summary.json", {**mine.read_metadata("summary.json"), "status": "running"})
    with mine.hold_lock():
        yield mine


def wait_until(is_true: Callable[[], Any], process: BaseProcess) -> None:
    for _ in range(1200):
        if is_true():
            return
        assert process.is_alive(), process.exitcode
        time.sleep(0.05)
    raise AssertionError("in vain")


def test_a_run_is_watched_to_its_end_on_80_by_24(
    tmp_path: Path, settings: list[str], mine: RunFolder, terminal: Terminal
) -> None:
    before = termios.tcgetattr(terminal.theirs)
    training = fork_command(tmp_path, "train", *settings)
    wait_until(mine.metadata.is_dir, training)
    watching = fork_command(tmp_path, "watch", redirect=terminal.enter)
    terminal.watch(watching, until="mine")
    terminal.watch(watching)
    training.join(60)
    assert (training.exitcode, watching.exitcode) == (0, 0)
    screen = terminal.screen
    assert screen.was_alternate and not screen.is_alternate and not screen.faults
    assert "step 12 of 12" in screen.printed and "finished" in screen.printed and "update size" in screen.printed
    assert "the base: validation loss" in screen.printed.splitlines()[-1]
    assert max(map(len, screen.printed.splitlines())) <= 80 and len(screen.printed.splitlines()) <= 24
    assert termios.tcgetattr(terminal.theirs) == before


@pytest.mark.slow
def test_a_smaller_and_a_larger_terminal_are_filled_and_a_killed_run_ends_the_view(
    tmp_path: Path, settings: list[str], mine: RunFolder, terminal: Terminal
) -> None:
    training = fork_command(tmp_path, "train", *settings, "training.epochs=200")
    try:
        wait_until(lambda: mine.metrics_file.is_file() and mine.metrics_file.stat().st_size > 4000, training)
        watching = fork_command(tmp_path, "watch", "mine", redirect=terminal.enter)
        terminal.watch(watching, until=LAST_LINE)
        assert not terminal.screen.faults
        for columns, lines in ((50, 12), (20, 4), (130, 45)):
            terminal.resize(columns, lines)
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                terminal.read(0.1)  # frames of the size before
            terminal.screen = TerminalScreen(columns, lines, is_alternate=True)
            terminal.watch(watching, until=LAST_LINE)
            assert not terminal.screen.faults
        assert terminal.screen.text.count("expected") > 1 and "update size" in terminal.screen.text
    finally:
        training.kill()
    terminal.watch(watching)
    assert watching.exitcode == 0 and "its process died" in terminal.screen.printed
    assert "interrupted" in terminal.screen.printed


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl+C"])
def test_a_key_ends_the_view_and_signals_no_process(
    tmp_path: Path, running: RunFolder, terminal: Terminal, key: bytes
) -> None:
    neighbor = tmp_path / "interrupted"

    def enter_with_neighbor() -> None:
        """A process that gets every signal of this terminal, as a run in the background of a script does."""
        terminal.enter()
        if os.fork() == 0:
            signal.signal(signal.SIGINT, lambda *_: neighbor.touch())
            time.sleep(5)
            os._exit(0)

    watching = fork_command(tmp_path, "watch", redirect=enter_with_neighbor)
    terminal.watch(watching, until=LAST_LINE)
    terminal.type(key)
    terminal.watch(watching)
    assert watching.exitcode == 0 and "the run goes on" in terminal.screen.printed
    assert not neighbor.exists() and running.status == "running" and not terminal.screen.faults


def test_a_terminal_that_goes_away_or_sigterm_ends_the_view(
    tmp_path: Path, running: RunFolder, terminal: Terminal
) -> None:
    before = termios.tcgetattr(terminal.theirs)
    watching = fork_command(tmp_path, "watch", "--no-layers", redirect=terminal.enter)
    terminal.watch(watching, until=LAST_LINE)
    assert "update size" not in terminal.screen.text
    os.kill(watching.pid or 0, signal.SIGTERM)
    terminal.watch(watching)
    assert watching.exitcode == 143 and not terminal.screen.is_alternate
    assert termios.tcgetattr(terminal.theirs) == before
    gone = Terminal(80, 24)
    watching = fork_command(tmp_path, "watch", "--no-layers", redirect=gone.enter)
    gone.watch(watching, until=LAST_LINE)
    gone.close()
    watching.join(20)
    assert watching.exitcode == 0


def test_a_run_that_is_deleted_ends_the_view_with_what_was_known(
    tmp_path: Path, running: RunFolder, terminal: Terminal
) -> None:
    watching = fork_command(tmp_path, "watch", redirect=terminal.enter)
    terminal.watch(watching, until=LAST_LINE)
    shutil.rmtree(running.root)
    terminal.watch(watching)
    assert watching.exitcode == 0 and "deleted" in terminal.screen.printed
    assert "than the base: validation loss" in terminal.screen.printed


@pytest.mark.slow
def test_without_a_terminal_each_validation_is_a_line_until_the_run_ends(
    tmp_path: Path, settings: list[str], mine: RunFolder
) -> None:
    training = fork_command(tmp_path, "train", *settings)
    wait_until(mine.metadata.is_dir, training)
    (tmp_path / "watching").mkdir()
    watching = fork_command(tmp_path / "watching", "watch", str(mine.root), "--json")
    watching.join(120)
    training.join(60)
    assert (training.exitcode, watching.exitcode) == (0, 0)
    lines = (tmp_path / "watching/stderr.txt").read_text().splitlines()
    assert all(line.startswith("20") and "Z " in line for line in lines), lines
    assert [int(line.split()[2].rstrip(":")) for line in lines if " step " in line and ": validation" in line] == [
        4,
        8,
        12,
    ]
    assert "finished, step 12 of 12" in lines[-2] and "the base: validation loss" in lines[-1]
    values = json.loads((tmp_path / "watching/stdout.txt").read_text())
    assert (values["status"], values["step"], values["total_steps"]) == ("finished", 12, 12)
    assert values["verdict"]["basis"] == "training" and values["validation_step"] == 12


def test_once_prints_a_frame_for_a_log_and_the_state_as_json(call: Call, finished_run: RunFolder) -> None:
    result = call("watch", str(finished_run.root), "--once", "--json")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["status"] == "finished" and json.loads(line)["remaining_seconds"] is None
    frame = result.stderr.splitlines()
    assert finished_run.run_id in frame[0] and frame[0].endswith("finished") and "update size" in result.stderr
    assert max(map(len, frame)) <= 80 and not any(each.endswith(" ") or "\x1b" in each for each in frame)


def test_a_run_that_prepares_is_shown_as_such(call: Call, running: RunFolder) -> None:
    for path in running.logs.iterdir():
        path.unlink()
    result = call("watch", str(running.root), "--once", "--no-layers")
    assert result.exit_code == 0 and "preparing" in result.stdout and "nothing measured yet" in result.stdout


def test_runs_are_found_as_by_every_command_and_other_settings_are_refused(
    call: Call, tmp_path: Path, running: RunFolder
) -> None:
    place = f"output.base_output_dir={tmp_path / 'outputs'}"
    for words in ([place], ["mine", place], ["default", place]):
        assert "mine" in call("watch", *words, "--once", "--no-layers").stdout.splitlines()[0]
    refused = call("watch", "training.lr=1e-3", place)
    assert refused.exit_code == 2 and "watch looks at a run, and trains none" in refused.stderr
    missing = call("watch", "nothing", place)
    assert missing.exit_code == 1 and "no run 'nothing'" in missing.stderr


def test_torch_is_imported_for_the_layers_alone(finished_run: RunFolder) -> None:
    script = "import sys; from training_lens.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
    script += "print(*{'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    command = [sys.executable, "-c", script, "watch", str(finished_run.root), "--once", "--no-layers"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert not done.stdout.splitlines()[-1].strip(), done.stdout
