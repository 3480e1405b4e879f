"""Machines of a test: processes of the command that have a host name, a time zone and a folder of their own."""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from forked import fork, fork_command, redirect_to_files  # type: ignore[import-not-found]

NEW_HOST_NAME = 0x04000000  # CLONE_NEWUTS


@dataclass(frozen=True)
class Machine:
    """A host of this name; `folder` is where its commands run."""

    folder: Path
    name: str
    zone: str = "UTC"

    def start(self, *words: str) -> BaseProcess:
        """Start `training-lens WORDS`; what it prints is `stdout` and `stderr`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in ("stdout.txt", "stderr.txt"):
            (self.folder / file).write_text("")
        process: BaseProcess = fork_command(self.folder, *words, redirect=self._become)
        return process

    def run(self, *words: str) -> int | None:
        """The exit code of `training-lens WORDS`."""
        process = self.start(*words)
        process.join()
        return process.exitcode

    def _become(self) -> None:
        rename_host(self.name)
        os.environ["PGTZ"] = self.zone
        redirect_to_files()

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout.txt").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr.txt").read_text()


def rename_host(name: str) -> None:
    """Give this process a host name of its own, which no other process sees."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_HOST_NAME):
        raise OSError(ctypes.get_errno(), "a host name of its own takes the rights of root")
    socket.sethostname(name)


def can_rename_hosts() -> bool:
    process = fork(rename_host, "elsewhere")
    process.join()
    return bool(process.exitcode == 0)
