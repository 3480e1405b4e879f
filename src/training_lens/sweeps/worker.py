"""A process of a sweep as others see it: a lock on its machine, and heartbeats in the storage.

The operating system frees a lock when its process dies, which is visible at once on the same machine. Other machines
use the heartbeat: without one for `sweep.takeover_seconds` by the database's clock, the process counts as dead.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from training_lens.errors import TrainingLensError


class Worker:
    """This process; a context that holds its lock, in the folder of the sweep's locks."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.host = socket.gethostname()
        self.path = (folder / f"{self.host}-{os.getpid()}-{secrets.token_hex(2)}.lock").resolve()
        self._lock = FileLock(self.path)

    def __enter__(self) -> Worker:
        self._lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lock.release()
        # After other errors a trial may still be running in the storage: the free lock shows that it has no process.
        if kind is None or issubclass(kind, TrainingLensError):
            self.path.unlink(missing_ok=True)

    @property
    def trial_attributes(self) -> dict[str, str]:
        """The attributes of a trial that identify its process."""
        return {"host": self.host, "lock": str(self.path)}


def is_alive(attributes: Mapping[str, Any]) -> bool | None:
    """Whether the process of these attributes is alive; None if this machine cannot tell.

    The path of the lock comes from the study's database, which is untrusted: only an empty file with the name of such a
    lock is opened.
    """
    path, host = Path(str(attributes.get("lock", ""))), socket.gethostname()
    if attributes.get("host") != host or not re.fullmatch(rf"{re.escape(host)}-\d+-[0-9a-f]{{4}}\.lock", path.name):
        return None
    try:
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size:
            return None
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # deleted by another process, another user's, or on a file system without locks
        return None


def delete_lock(attributes: Mapping[str, Any]) -> None:
    """Delete the lock file of a dead process (see `is_alive`) when no running trial refers to it any more."""
    if is_alive(attributes) is False:
        Path(str(attributes["lock"])).unlink(missing_ok=True)


@contextmanager
def send_heartbeats(storage: RDBStorage, trial_id: int, every: float) -> Iterator[None]:
    """Inside the context, a heartbeat is sent to the storage every so many seconds."""
    done = Event()

    def send_heartbeat() -> None:
        while not done.wait(every):
            with suppress(StorageInternalError):  # temporarily unavailable: the next heartbeat counts
                storage.record_heartbeat(trial_id)
        storage.remove_session()  # this thread's connection

    storage.record_heartbeat(trial_id)
    thread = Thread(target=send_heartbeat, name="sweep-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
