"""Processes that tests kill, limit or leave alone, forked from this one: they need not import torch again.

What a process reads when it starts (imports, the environment, closed descriptors) takes a Python of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState


def fork(action: Callable[..., Any], *given: Any, environment: dict[str, str] | None = None) -> BaseProcess:
    """Start a process that does this, with what stands in `environment` besides; its `exitcode` is -N by signal N."""
    process = multiprocessing.get_context("fork").Process(target=_act, args=(action, given, environment or {}))
    process.start()
    return process


def fork_processes(count: int, action: Callable[..., Any], *given: Any) -> list[BaseProcess]:
    """Start processes that do this with the environment that torchrun gives them: gloo on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = map(str, range(count))
    return [fork(_act_apart, action, given, environment={**shared, "RANK": r, "LOCAL_RANK": r}) for r in ranks]


def join_processes(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait for all; their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def fork_command(folder: Path, *arguments: str, redirect: Callable[[], None] | None = None) -> BaseProcess:
    """Start `training-lens ARGUMENTS` in a folder.

    Args:
        redirect: opens or closes descriptors 0, 1 and 2 in the new process; by default see `redirect_to_files`.
    """
    return fork(_run_command, folder, arguments, redirect or redirect_to_files)


def fork_script(folder: Path, script: Path, *arguments: str) -> BaseProcess:
    """Start `python SCRIPT ARGUMENTS` in a folder; for what it prints see `redirect_to_files`."""
    return fork(_run_script, folder, script, arguments, redirect_to_files)


def run_python(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives of `python -m training_lens ARGUMENTS` or `python -P SCRIPT ARGUMENTS`."""
    _, option, name, *arguments = command
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / kind for kind in ("stdout.txt", "stderr.txt")]
        action = partial(_run_command, Path.cwd()) if option == "-m" else partial(_run_script, Path.cwd(), Path(name))
        process = fork(action, tuple(arguments), partial(redirect_to_files, folder=Path(place)))
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode or 0, *(file.read_text() for file in files))


def redirect_to_files(stdin: int | None = None, folder: Path = Path()) -> None:
    """Standard output and error go to `stdout.txt` and `stderr.txt`; the input is an open descriptor, or nothing."""
    os.dup2(os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin, 0)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)


def _act(action: Callable[..., Any], given: tuple[Any, ...], environment: dict[str, str]) -> None:
    torch.set_num_threads(1)  # the fork's thread pool is made anew here, before two threads ask for it at once
    os.environ.update(environment)
    action(*given)


def _act_apart(action: Callable[..., Any], given: tuple[Any, ...]) -> None:
    PartialState._reset_state()  # of this process, which was one of one
    action(*given)


def _run_command(folder: Path, arguments: tuple[str, ...], redirect: Callable[[], None]) -> None:
    from training_lens.cli import main

    _enter(folder, redirect)
    sys.argv = ["training-lens", *arguments]
    main()


def _run_script(folder: Path, script: Path, arguments: tuple[str, ...], redirect: Callable[[], None]) -> None:
    _enter(folder, redirect)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def _enter(folder: Path, redirect: Callable[[], None]) -> None:
    os.chdir(folder)
    redirect()
    sys.stdin, sys.stdout, sys.stderr = (_open_stream(number) for number in range(3))


def _open_stream(number: int) -> Any:
    """The stream of a standard descriptor, None where that is closed: as when Python starts."""
    try:
        return os.fdopen(number, "w" if number else "r", closefd=False)
    except OSError:
        return None
