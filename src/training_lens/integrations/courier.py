"""The courier: a process of its own that sends a run while it trains, at the lowest priority.

Nothing that a service or its client does can reach the training process: not a crash, not a hang, not a lock held
while a package is imported. The courier reads the run's folder; it learns that the run has ended when its standard
input closes, also where the training process was killed. It says what is to be said on standard output, a JSON line
each.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from training_lens.config.run_config import require_consent
from training_lens.integrations.delivery import Integration, IntegrationManager
from training_lens.integrations.integration_specs import list_integrations
from training_lens.integrations.record import RunRecord
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.logging import ROOT, get_logger

logger = get_logger(__name__)
IntegrationFactory = Callable[[RunRecord], Integration]
GRACE_SECONDS = 10.0  # beyond its own deadline, until a courier that hangs is killed
DYING_SECONDS = 5.0  # until the lock of a killed process is free
QUIET = {  # no telemetry of the clients, none of their output, no wish for a terminal
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "OMP_NUM_THREADS": "1",
}


class Courier:
    """The courier of a run, seen from the process that trains it.

    Args:
        run: its folder, with its config in it.
        seconds: most that `finish` waits for what is not sent yet.
    """

    def __init__(self, run: RunFolder, seconds: float) -> None:
        self._run, self._seconds = run, seconds
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None

    def start(self) -> None:
        """Start the process. Where that fails, the run is not sent, and says so."""
        path = os.pathsep.join([*filter(None, sys.path), str(Path.cwd())])
        allowed = list(RunRecord(self._run).config.tracking.custom)  # by who trains it
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(self._run.root), *allowed],  # -P: no module from this folder
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                env={**os.environ, **QUIET, "PYTHONPATH": path},
                process_group=0,  # Ctrl-C is the training's business; a session of its own could undo the low priority
            )  # fmt: skip
        except OSError as error:
            logger.warning("the courier cannot start (%s): training-lens sync %s sends the run", error, self._run.root)
            return
        self._listener = threading.Thread(target=self._forward_log, name="courier", daemon=True)
        self._listener.start()

    def finish(self) -> None:
        """The run has ended: wait until the courier has sent the rest, or its time is over."""
        if self._process is None or self._listener is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            code = self._process.wait(self._seconds + GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a hang, or a user who does not want to wait
            self._process.kill()
            code = self._process.wait()
        finally:
            self._listener.join(5.0)
        if code:
            logger.warning(
                "the courier ended before it had sent all (exit code %d): training-lens sync %s", code, self._run.root
            )

    def _forward_log(self) -> None:
        """Its lines to our log."""
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    said = json.loads(line)
                    logger.log(said["level"], "%s", said["message"])
                except (ValueError, TypeError, KeyError):  # a client's own print
                    logger.debug("courier: %s", line.rstrip())


@contextmanager
def send_while_training(run: RunFolder, own: Sequence[IntegrationFactory] = ()) -> Iterator[None]:
    """Within the block the run is sent to where its config says; at its end, what is not sent yet.

    Args:
        run: with its config and summary written; by the end of the block its status must be told there.
        own: integrations of the user's, in Python: each is built for the run, and lives in a thread of this process.
    """
    record = RunRecord(run)
    asked = list_integrations(record.config)
    near = [item.build(record) for item in asked if item.integration.in_process] + [build(record) for build in own]
    tracking = record.config.tracking
    manager = IntegrationManager(near, run.tracking, tracking.send_seconds)
    courier = Courier(run, tracking.wait_seconds) if len(asked) > len(near) - len(own) else None
    if courier:
        courier.start()
    manager.start()
    try:
        yield
    finally:
        manager.finish(tracking.wait_seconds)  # first: the courier's mirror sends what they wrote, too
        if courier:
            logger.debug("sending what is not sent yet, for at most %g s", tracking.wait_seconds)
            courier.finish()


class JsonLineHandler(logging.Handler):
    """Log records as JSON lines on standard output, while somebody listens."""

    def emit(self, record: logging.LogRecord) -> None:
        line = json.dumps({"level": record.levelno, "message": self.format(record)})
        try:
            print(line, flush=True)
        except OSError:  # the training process was killed; what a tracker prints must not fail for that
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(root: str, *allowed: str) -> int:
    """Send the run at `root` until standard input closes and all is sent, or the time for it is over.

    Args:
        allowed: the trackers of tracking.custom that the user trains with.
    """
    _log_to_stdout()
    _lower_priority()
    started = time.perf_counter()
    run = RunRecord(RunFolder(Path(root)))
    tracking = run.config.tracking
    require_consent(run.folder.root, run.config, {"tracking": {"custom": dict.fromkeys(allowed)}}, "tracking.custom")
    remote = [asked.build(run) for asked in list_integrations(run.config) if not asked.integration.in_process]
    patience = tracking.wait_seconds + GRACE_SECONDS  # the courier of a run that was killed may be sending still
    manager = IntegrationManager(remote, run.folder.tracking, tracking.send_seconds, patience)
    trained_by = run.folder.process_label
    manager.start()
    sys.stdin.read()  # until the training process closes it, or dies
    logger.debug("courier: the run's process has ended")
    _wait_for_end(run)
    if run.folder.process_label != trained_by:
        return 0  # the run was killed and goes on already: its new courier sends the rest, from what is remembered
    ends = ", ".join(f"{state.name} {state.status}" for state in manager.finish(tracking.wait_seconds))
    cpu, wall = time.process_time(), time.perf_counter() - started
    logger.debug("courier: %s; it took %.1f s of CPU in %.1f s", ends, cpu, wall)
    return 0


def _log_to_stdout() -> None:
    """What is logged from here on goes to the training process, and what libraries log does not."""
    from training_lens.utils.logging import quiet_libraries

    quiet_libraries()
    log = logging.getLogger(ROOT)
    log.addHandler(JsonLineHandler())
    log.setLevel(logging.DEBUG)
    log.propagate = False
    logging.getLogger(f"{ROOT}.analysis").setLevel(logging.WARNING)  # its hints are for who asked for an analysis


def _lower_priority() -> None:
    """The lowest priority, for this process and what its clients start; where the system has it, of idle time alone.

    A process that is merely nice may keep a core for milliseconds when a training thread wakes, and all other threads
    of that training wait for it.
    """
    with suppress(AttributeError, OSError):  # a system without priorities
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _wait_for_end(run: RunRecord) -> None:
    """Until the run says how it ended: a process that is killed lets go of its files one by one."""
    deadline = time.monotonic() + DYING_SECONDS
    while run.status == "running" and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # no exit hook of a client may hold the process
