"""The courier: a separate process that sends a run while it trains, at the lowest priority.

No crash, hang or import lock of a service's client can reach the training process. The courier reads the run's folder.
It knows that the run has ended, or that the training process was killed, when its standard input closes. It writes log
records to standard output, one JSON line each.
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
from training_lens.utils.logging import ROOT, get_logger, quiet_libraries

logger = get_logger(__name__)
IntegrationFactory = Callable[[RunRecord], Integration]
GRACE_SECONDS = 10.0  # after its deadline, until a courier that hangs is killed
DYING_SECONDS = 5.0  # until the lock of a killed process is released
QUIET = {  # no telemetry, output or terminal use of the clients
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


def quiet_clients() -> None:
    """Set the environment variables of `QUIET`, unless the user has set them."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})


class Courier:
    """Starts and stops the courier of a run, in the training process; `finish` waits for at most `seconds`."""

    def __init__(self, run: RunFolder, seconds: float) -> None:
        self._run, self._seconds = run, seconds
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None

    def start(self) -> None:
        """Start the process. If that fails, a warning says that the run is not sent."""
        path = os.pathsep.join([*filter(None, sys.path), str(Path.cwd())])
        allowed = list(RunRecord(self._run).config.tracking.custom)  # by the user who trains
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(self._run.root), *allowed],  # -P: no module from this folder
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                env={**os.environ, **QUIET, "PYTHONPATH": path},
                process_group=0,  # Ctrl-C is for the training process; a new session could undo the low priority
            )  # fmt: skip
        except OSError as error:
            logger.warning("the courier cannot start (%s): training-lens sync %s sends the run", error, self._run.root)
            return
        self._listener = threading.Thread(target=self._forward_log, name="courier", daemon=True)
        self._listener.start()

    def finish(self) -> None:
        """Wait until the courier has sent the rest of the ended run, or its time is over."""
        if self._process is None or self._listener is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            code = self._process.wait(self._seconds + GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # it hangs, or the user does not want to wait
            self._process.kill()
            code = self._process.wait()
        finally:
            self._listener.join(5.0)
        if code:
            logger.warning(
                "the courier ended before it had sent all (exit code %d): training-lens sync %s", code, self._run.root
            )

    def _forward_log(self) -> None:
        """Forward the courier's log records to our log."""
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    logger.log(record["level"], "%s", record["message"])
                except (ValueError, TypeError, KeyError):  # a client's own print
                    logger.debug("courier: %s", line.rstrip())


@contextmanager
def send_while_training(run: RunFolder, own: Sequence[IntegrationFactory] = ()) -> Iterator[None]:
    """Within the block, the run is sent to the destinations of its config; at its end, what is not sent yet.

    Integrations that only write files run in threads of this process, the others in the courier.

    Args:
        run: with its config and summary written; its final status must be written by the end of the block.
        own: the user's integrations in Python, which run in threads of this process.
    """
    record = RunRecord(run)
    configured = list_integrations(record.config)
    local = [spec.build(record) for spec in configured if spec.integration.in_process]
    tracking = record.config.tracking
    courier = Courier(run, tracking.wait_seconds) if len(configured) > len(local) else None
    manager = IntegrationManager([*local, *(build(record) for build in own)], run.tracking, tracking.send_seconds)
    if courier:
        courier.start()
    manager.start()
    try:
        yield
    finally:
        manager.finish(tracking.wait_seconds)  # first: the courier's mirror sends also what they wrote
        if courier:
            logger.debug("sending what is not sent yet, for at most %g s", tracking.wait_seconds)
            courier.finish()


class JsonLineHandler(logging.Handler):
    """Writes log records as JSON lines to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        line = json.dumps({"level": record.levelno, "message": self.format(record)})
        try:
            print(line, flush=True)
        except OSError:  # the training process was killed; a tracker's print must not fail now
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(root: str, *allowed: str) -> int:
    """Send the run at `root` until standard input closes and everything is sent, or time is up.

    `allowed` are the trackers of tracking.custom that the user trains with.
    """
    _log_to_stdout()
    # The lowest priority, also of child processes: idle scheduling, where the system has it. A process that is merely
    # nice may keep a core for milliseconds when a training thread wakes up, and all others wait for that one.
    with suppress(AttributeError, OSError):
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    started = time.perf_counter()
    run = RunRecord(RunFolder(Path(root)))
    tracking = run.config.tracking
    require_consent(run.folder.root, run.config, {"tracking": {"custom": dict.fromkeys(allowed)}}, "tracking.custom")
    remote = [spec.build(run) for spec in list_integrations(run.config) if not spec.integration.in_process]
    patience = tracking.wait_seconds + GRACE_SECONDS  # the courier of a killed run may still be sending
    manager = IntegrationManager(remote, run.folder.tracking, tracking.send_seconds, patience)
    trained_by = run.folder.process_label
    manager.start()
    sys.stdin.read()  # returns when the training process closes it or dies
    logger.debug("courier: the run's process has ended")
    deadline = time.monotonic() + DYING_SECONDS  # a killed process releases its files one by one
    while run.status == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    if run.folder.process_label != trained_by:
        return 0  # the run was killed and resumed: its new courier sends the rest
    ends = ", ".join(f"{state.name} {state.status}" for state in manager.finish(tracking.wait_seconds))
    cpu, wall = time.process_time(), time.perf_counter() - started
    logger.debug("courier: %s; it took %.1f s of CPU in %.1f s", ends, cpu, wall)
    return 0


def _log_to_stdout() -> None:
    """Send our log records to the training process, and silence those of libraries."""
    quiet_libraries()
    log = logging.getLogger(ROOT)
    log.addHandler(JsonLineHandler())
    log.setLevel(logging.DEBUG)
    log.propagate = False
    logging.getLogger(f"{ROOT}.analysis").setLevel(logging.WARNING)  # its hints are for users of the analysis


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # exit hooks of a client must not block
