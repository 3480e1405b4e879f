"""Imports the product once; each line on standard input is a command, run in a child that is forked for it.

The answer is a line, too: how the child ended, after how many seconds, with how much memory, and how many calls changed
files. Started with `interpose.c` preloaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

PRELOADED = ctypes.CDLL(None)
TOO_LONG = 150.0  # seconds until a child that does not end is killed; the machine may be busy


def main() -> None:
    import_product()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


def import_product() -> None:
    """Import what commands import, and start no thread: a child has those of its parent no more."""
    import importlib
    import pkgutil

    import training_lens

    for module in pkgutil.walk_packages(training_lens.__path__, "training_lens."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if threading.active_count() > 1:
        raise SystemExit(f"threads before the first fork: {threading.enumerate()}")


def serve(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one command, once for each of the outputs at the same time, and say how each ended.

    Args:
        request: `arguments`, `folder` (where it runs), `outputs` (files for what is printed; `.errors` beside each),
            `environment`, `unset` (variables that are not there); `kinds`, `at` and `action` as `faults_arm` takes
            them; `signals`: pairs of seconds and a signal to send then; `threads`: how many may be started; `memory`:
            bytes that may be taken besides those of the imports; `clock`: after how many readings it is how many
            seconds earlier.
    """
    children = [start(request, output) for output in request["outputs"]]
    return [child.end() for child in children]


class Child:
    """A forked process that runs a command."""

    def __init__(self, number: int, reader: int, began: float, signals: list[tuple[float, int]]) -> None:
        self._number, self._reader, self._began, self._signals = number, reader, began, signals

    def end(self) -> dict[str, Any]:
        """Wait for its end, and end what it started and left."""
        status, usage = self._wait(self._began + TOO_LONG)
        calls = os.read(self._reader, 64) if select.select([self._reader], [], [], 0)[0] else b""
        os.close(self._reader)
        self._kill_group()
        return {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": round(time.perf_counter() - self._began, 3),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
            "bytes": usage.ru_maxrss * 1024,
            "calls": int(calls or 0),
        }

    def _wait(self, too_late: float) -> tuple[int, resource.struct_rusage]:
        """How it ended; signals are sent when they are due."""
        while True:
            found, status, usage = os.wait4(self._number, os.WNOHANG)
            if found:
                return status, usage
            now = time.perf_counter()
            while self._signals and self._signals[0][0] <= now:
                os.kill(self._number, self._signals.pop(0)[1])
            if now > too_late:
                self._kill_group()
            time.sleep(0.002)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._number, signal.SIGKILL)


def start(request: dict[str, Any], output: str) -> Child:
    reader, writer = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os._exit(be_child(request, writer, output))
        finally:
            os._exit(128 + signal.SIGINT)  # interrupted before it was ready: it never goes on as a server
    os.close(writer)
    return Child(child, reader, began, [(began + seconds, number) for seconds, number in request.get("signals", [])])


def be_child(request: dict[str, Any], writer: int, output: str) -> int:
    """Run the command as its own process would."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request.get("environment", {}))
    for name in request.get("unset", []):
        os.environ.pop(name, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the server may have ignored it
    for place, descriptors in ((os.devnull, (0,)), (output, (1,)), (f"{output}.errors", (2,))):
        opened = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (place != os.devnull), 0o666)
        for number in descriptors:
            os.dup2(opened, number)
    sys.argv = ["training-lens", *request["arguments"]]
    break_machine(request)
    code = 0
    try:
        from training_lens.cli import main as command

        command()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(writer, str(PRELOADED.faults_calls()).encode())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def break_machine(request: dict[str, Any]) -> None:
    """Arm the faults that the request names."""
    if "threads" in request:
        PRELOADED.faults_limit_threads(ctypes.c_long(request["threads"]))
    if "clock" in request:
        PRELOADED.faults_turn_clock(*(ctypes.c_long(value) for value in request["clock"]))
    if "memory" in request:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    at, action = request.get("at", 0), request.get("action", 0)
    PRELOADED.faults_arm(request.get("kinds", 7), ctypes.c_long(at), action, request["folder"].encode())


if __name__ == "__main__":
    main()
