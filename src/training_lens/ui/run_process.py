"""The process that trains a run: whether it lives, whether it is the one that was recorded, and SIGINT to it alone.

Process ids are reused. A process is known by its id together with the time at which the kernel says that it started;
a run's process also by its open lock file. Linux tells both in /proc; where there is no /proc, nothing is signalled.
"""

from __future__ import annotations

import os
import platform
import signal
from contextlib import suppress
from pathlib import Path

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.run_folder import PROCESS, RunFolder

PROC = Path("/proc")


def read_start_ticks(pid: int) -> int | None:
    """When a living process started, in clock ticks since the machine did; None for one that ended, or without /proc.

    A process that ended and is not waited for yet (a zombie) has ended.
    """
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_same_process(pid: int, start_ticks: int | None) -> bool:
    """Whether the process that started then lives."""
    return start_ticks is not None and read_start_ticks(pid) == start_ticks


def find_training_process(run: RunFolder) -> tuple[int, int | None]:
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
    start_ticks = read_start_ticks(pid)  # before the lock is looked at: a later process of this id has another
    if start_ticks is None or not _holds_file(pid, run.lock_file):
        raise ConfigurationError(
            f"which process trains the run {run.run_id} is not certain ({run.process_label} does not hold its lock, or "
            "is another user's), so none was signalled. Press Ctrl-C in its terminal."
        )
    return pid, start_ticks


def _is_locked(run: RunFolder) -> bool:
    try:
        run.require_free()
    except CheckpointError:
        return True
    return False


def _holds_file(pid: int, file: Path) -> bool:
    """Whether a process has a file open; False where that cannot be seen."""
    with suppress(OSError):
        wanted = file.stat()
        for descriptor in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.path.samestat(descriptor.stat(), wanted):
                    return True
    return False


def interrupt_process(pid: int, start_ticks: int | None) -> None:
    """Send SIGINT to the process that started then, and to no other.

    Raises:
        ConfigurationError: it has ended, or belongs to another user.
    """
    try:
        handle = os.pidfd_open(pid)  # means this process for good, even if its id is used again
    except AttributeError:
        raise ConfigurationError(f"this system cannot name a process for sure: stop it with kill -INT {pid}.") from None
    except OSError as error:
        raise ConfigurationError(f"process {pid} has ended.") from error
    try:
        if not is_same_process(pid, start_ticks):
            raise ConfigurationError(f"process {pid} has ended.")
        signal.pidfd_send_signal(handle, signal.SIGINT)
    except OSError as error:
        raise ConfigurationError(f"process {pid} cannot be signalled ({error.strerror}): stop it yourself.") from error
    finally:
        os.close(handle)
