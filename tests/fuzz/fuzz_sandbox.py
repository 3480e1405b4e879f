"""One case in a process of its own: forked from one that imported the product, with limits of time and memory."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

Kind = Literal["result", "clear error", "traceback", "crash", "over 30 s", "over 2 GB", "outside write"]
BAD: tuple[Kind, ...] = ("traceback", "crash", "over 30 s", "over 2 GB", "outside write")
SECONDS, WALL_SECONDS, BYTES = 30.0, 60.0, 2 << 30  # of processor time; waiting for something that never comes
LONGEST_MESSAGE = 6000  # characters: an error is a paragraph, not a screen of what was wrong


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `seconds` are of the processor, `peak_bytes` of the process, `told` is its error."""

    kind: Kind
    seconds: float
    peak_bytes: int
    told: str


def run_forked(call: Callable[[], object], folder: Path) -> Outcome:
    """Run `call` in a forked process in `folder`: an error of ours, or exit code 1 or 2 with a message, is clear."""
    began = time.perf_counter()
    reader, writer = os.pipe()
    if not (process := os.fork()):
        os.close(reader)
        _run_child(call, folder, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        status, usage = _wait(process, began + WALL_SECONDS)
        said = answer.read()
    seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    if seconds >= SECONDS or time.perf_counter() - began >= WALL_SECONDS:
        return Outcome("over 30 s", seconds, peak, "")
    if peak > BYTES:
        return Outcome("over 2 GB", seconds, peak, "")
    if not said:
        return Outcome("crash", seconds, peak, f"wait status {status}")
    kind, told = pickle.loads(said)  # noqa: S301  # of our own child
    return Outcome(kind, seconds, peak, told)


def _wait(process: int, until: float) -> tuple[int, resource.struct_rusage]:
    while time.perf_counter() < until:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            return status, usage
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    return status, usage


def _run_child(call: Callable[[], object], folder: Path, writer: int) -> NoReturn:
    os.chdir(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES, used + 2 * BYTES))  # the machine is others', too
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryFile() as screen:
        for number in (1, 2):
            os.dup2(screen.fileno(), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        kind, told = _judge(call)
        sys.stdout.flush()
        sys.stderr.flush()
        screen.seek(0)
        told = told or screen.read(LONGEST_MESSAGE * 4).decode("utf-8", "replace")
    if kind == "clear error" and len(told) > LONGEST_MESSAGE:
        kind, told = "traceback", f"a message of {len(told)} characters: {told[:500]}"
    os.write(writer, pickle.dumps((kind, told[-4000:])))
    os._exit(0)


def _judge(call: Callable[[], object]) -> tuple[Kind, str]:
    from training_lens.cli.common import describe_error
    from training_lens.errors import TrainingLensError

    try:
        call()
    except (TrainingLensError, OSError) as error:
        return "clear error", describe_error(error)[0]
    except SystemExit as left:
        return ("result" if left.code in (0, None) else "clear error"), ""
    except BaseException:
        return "traceback", traceback.format_exc()
    return "result", ""


def command(args: Sequence[str]) -> Callable[[], object]:
    """The command line as a call: what it prints is its message."""

    def call() -> None:
        from training_lens.cli import cli

        cli(list(args))

    return call
