"""Imports the product once; each line on standard input is a command, run in a child that is forked for it.

The answer is a line, too: how the child ended, after how many seconds, with how much memory, and how many calls changed
files. Started with `interpose.c` preloaded.
"""

from __future__ import annotations

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
from typing import Any

PRELOADED = ctypes.CDLL(None)
TOO_LONG = 60.0  # seconds until a child that does not end is killed


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


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command.

    Args:
        request: `arguments`, `folder` (where it runs), `output` (a file for what it prints), `environment`; `kinds`,
            `at` and `action` as `faults_arm` takes them; `signals`: pairs of seconds and a signal to send then.
    """
    reader, writer = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(be_child(request, writer))
    os.close(writer)
    ended = wait(child, [(began + seconds, number) for seconds, number in request.get("signals", [])], began + TOO_LONG)
    told = os.read(reader, 64) if select.select([reader], [], [], 0)[0] else b""
    os.close(reader)
    kill_group(child)
    status, usage = ended
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": round(time.perf_counter() - began, 3),
        "bytes": usage.ru_maxrss * 1024,
        "calls": int(told or 0),
    }


def wait(child: int, signals: list[tuple[float, int]], too_late: float) -> tuple[int, resource.struct_rusage]:
    """How the child ended; signals are sent when they are due."""
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        now = time.perf_counter()
        while signals and signals[0][0] <= now:
            os.kill(child, signals.pop(0)[1])
        if now > too_late:
            kill_group(child)
        time.sleep(0.002)


def kill_group(child: int) -> None:
    """Kill what the child started and left."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def be_child(request: dict[str, Any], writer: int) -> int:
    """Run the command as its own process would."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request.get("environment", {}))
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(descriptor, number)
    sys.argv = ["training-lens", *request["arguments"]]
    at, action = request.get("at", 0), request.get("action", 0)
    PRELOADED.faults_arm(request.get("kinds", 7), at, action, request["folder"].encode())
    code = 0
    try:
        from training_lens.cli import main as command

        command()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    os.write(writer, str(PRELOADED.faults_calls()).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
