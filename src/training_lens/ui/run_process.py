"""The process that trains a run: whether it lives, whether it is the one that was recorded, and a stop for it alone.

Process ids are reused. A process is known by its id together with the time at which it started; a run's process also by
its open lock file. What cannot be told for sure is not signalled.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.run_folder import PROCESS, RunFolder

PROC = Path("/proc")
STOP_SIGNAL = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
# Windows sends it to groups of processes of the same terminal alone: a run that was started elsewhere is not reached.
STOPS_OWN_ALONE = hasattr(signal, "CTRL_BREAK_EVENT")
OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows; elsewhere a session does it


def read_start(pid: int) -> float | None:
    """When a living process started; None for one that ended, or that cannot be looked at.

    In clock ticks since the machine did on Linux, which no change of the clock moves, and seconds since 1970 elsewhere.
    A process that ended and is not waited for yet (a zombie) has ended.
    """
    if not (PROC / "self/stat").exists():
        with suppress(psutil.Error, ValueError, OverflowError):
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
        return None
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_same_process(pid: int, start: float | None) -> bool:
    """Whether the process that started then lives."""
    return start is not None and read_start(pid) == start


def find_training_process(run: RunFolder) -> tuple[int, float | None]:
    """The process of this machine that trains the run: its id, and when it started.

    Raises:
        ConfigurationError: the run is on another machine, or its process cannot be told for sure.
    """
    if not _is_locked(run):
        raise ConfigurationError(f"no process trains the run {run.run_id}: there is nothing to stop.")
    record = run.read_metadata(PROCESS)
    pid, host = (record.get("pid"), record.get("host")) if isinstance(record, dict) else (None, None)
    if host != platform.node():
        raise ConfigurationError(f"the run is trained on another machine ({run.process_label}): stop it there.")
    pid = pid if isinstance(pid, int) and pid not in (1, os.getpid()) else 0
    start = read_start(pid)  # before the lock is looked at: a later process of this id has another
    if start is None or not _holds_file(pid, run.lock_file):
        raise ConfigurationError(
            f"which process trains the run {run.run_id} is not certain ({run.process_label} does not hold its lock, or "
            "is another user's), so none was signalled. Press Ctrl-C in its terminal."
        )
    return pid, start


def _is_locked(run: RunFolder) -> bool:
    try:
        run.require_free()
    except CheckpointError:
        return True
    return False


def _holds_file(pid: int, file: Path) -> bool:
    """Whether a process has a file open; False where that cannot be seen."""
    with suppress(psutil.Error, OSError):
        for opened in psutil.Process(pid).open_files():
            with suppress(OSError):  # deleted meanwhile
                if file.samefile(opened.path):
                    return True
    return False


def interrupt_process(pid: int, start: float | None) -> None:
    """Ask the process that started then, and no other, to stop: SIGINT, or Ctrl+Break on Windows.

    Raises:
        ConfigurationError: it has ended, or belongs to another user.
    """
    try:
        process = psutil.Process(pid)
        if not is_same_process(pid, start):
            raise psutil.NoSuchProcess(pid)
        process.send_signal(STOP_SIGNAL)  # which compares when it started once more
    except psutil.NoSuchProcess:
        raise ConfigurationError(f"process {pid} has ended.") from None
    except (psutil.Error, OSError) as error:
        raise ConfigurationError(f"process {pid} cannot be signalled ({error}): stop it yourself.") from error


def kill_with_children(pid: int) -> None:
    """End a process and all that it started, at once."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                each.kill()
