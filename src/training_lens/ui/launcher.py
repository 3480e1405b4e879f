"""Starts, stops and resumes runs as processes of their own, which outlive the page and the server.

What such a process prints is in {outputs}/launches/RUN_ID.log, and RUN_ID.json beside it says which process it is. They
are not in the run's folder, since that does not exist before the config, the data and the model were accepted, and a
start that fails before is what the log must explain.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock, Thread
from typing import IO, Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from training_lens.config.run_config import BASE
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.run_folder import UNFINISHED, RunFolder, new_run_id, runs_folder
from training_lens.runs.run_lookup import read_status
from training_lens.ui.run_process import (
    OWN_GROUP,
    STOPS_OWN_ALONE,
    find_training_process,
    interrupt_process,
    is_same_process,
    kill_with_children,
    read_start,
)
from training_lens.ui.settings_form import CheckedSettings, check_settings, describe_form, read_settings, write_word
from training_lens.ui.web import Outputs, is_plain_name, json_response, read_body
from training_lens.utils.files import read_json, write_json
from training_lens.utils.limits import read_text_end
from training_lens.utils.secrets import redact_text, redact_values

COMMAND = (sys.executable, "-P", "-m", "training_lens")  # -P: no module of the current folder, as training-lens itself
LAUNCHES = "launches"
SHOWN_LOG = 32_768  # bytes of the end of a log
VALIDATION_SECONDS = 120.0
WAIT_SECONDS = 0.1  # between two looks at a process that validates, or ends
ENDING_SECONDS = 60.0  # that a stopped process has to write its report, before a resume gives up
SAVES_ITSELF = "it saves itself after the step that it is in, and can be resumed"
ENDS_AT_ONCE = "it had not finished a step, so there may be nothing to resume"


@dataclass(frozen=True)
class Launch:
    """A process that was started for a run; `exit_code` is 128 + N for one that signal N ended, None if unknown."""

    experiment: str
    run: str
    pid: int
    host: str
    start: float | None
    command: str
    exit_code: int | None = None

    @property
    def lives(self) -> bool:
        return self.host == platform.node() and is_same_process(self.pid, self.start)


@dataclass
class Launcher:
    """The runs of one outputs folder, started from here or elsewhere."""

    outputs: Outputs
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # the last of each run
    _interrupted: set[tuple[int, float | None]] = field(default_factory=set)  # a second signal would not let them save
    _lock: Lock = field(default_factory=Lock)

    def start_training(self, settings: CheckedSettings) -> Launch:
        """Start a new run.

        Raises:
            ConfigurationError: the settings have problems.
        """
        if settings.config is None:
            raise ConfigurationError([f"{p.key}: {p.message}" if p.key else p.message for p in settings.problems])
        run_id, experiment = new_run_id(), settings.config.output.experiment_name
        folder = write_word(BASE, str(self.outputs.folder)).word
        words = [word for word in settings.words if word != folder]
        with self._lock:
            return self._launch(experiment, run_id, [*words, folder, f"output.run_id={run_id}"])

    def resume_training(self, run: RunFolder) -> Launch:
        """Continue a run that was stopped, or that failed.

        A run is interrupted before its process has ended: this waits for that.

        Raises:
            ConfigurationError: it is finished, or running.
        """
        deadline = time.monotonic() + ENDING_SECONDS
        while self._is_ending(run) and time.monotonic() < deadline:
            time.sleep(WAIT_SECONDS)
        with self._lock:
            status, launch = read_status(run), self._find_living(run.experiment_name, run.run_id)
            if launch or status == "running":
                label = f"process {launch.pid}" if launch else run.process_label
                raise ConfigurationError(f"the run {run.run_id} is running already ({label}).")
            if status not in UNFINISHED:
                raise ConfigurationError(
                    f"the run {run.run_id} is {status}, so there is nothing to resume. A new run can continue from its "
                    f"adapter with peft.from_adapter={run.root}."
                )
            return self._launch(run.experiment_name, run.run_id, ["--resume", str(run.root)])

    def _is_ending(self, run: RunFolder) -> bool:
        """Whether the run was stopped, and the process that was asked to still saves or writes its report."""
        launch = self._find_living(run.experiment_name, run.run_id)
        was_stopped = launch is not None and (launch.pid, launch.start) in self._interrupted
        return was_stopped and read_status(run) in UNFINISHED

    def stop_training(self, experiment: str, run_id: str) -> dict[str, Any]:
        """Ask the process that trains a run to stop, once; says what happens then.

        Raises:
            ConfigurationError: it does not run on this machine, or its process is not known for sure.
        """
        with self._lock:
            process, what = self._find_process(experiment, run_id)
            if process in self._interrupted:
                what = f"a stop was requested before; {what}"
            else:
                interrupt_process(*process)
                self._interrupted.add(process)
        return {"run": run_id, "pid": process[0], "message": f"The run {run_id} stops: {what}."}

    def _find_process(self, experiment: str, run_id: str) -> tuple[tuple[int, float | None], str]:
        """The process that trains a run, or is about to: its id and when it started; and what a stop does to it."""
        try:
            run = self.outputs.open_run(experiment, run_id)
        except HTTPException:  # not yet, or never
            status = "not there"
        else:
            status = read_status(run)
            if status == "running" and not STOPS_OWN_ALONE:
                return find_training_process(run), SAVES_ITSELF if run.metrics_file.exists() else ENDS_AT_ONCE
        launch = self._find_living(experiment, run_id)
        if launch is None and status == "running":
            raise ConfigurationError(f"the run {run_id} was started elsewhere: press Ctrl-C in its terminal.")
        if launch is not None and status == "running":
            return (launch.pid, launch.start), SAVES_ITSELF
        if launch is None or status not in (*UNFINISHED, "not there"):
            raise ConfigurationError(f"the run {run_id} is {status}: there is nothing to stop.")
        return (launch.pid, launch.start), ENDS_AT_ONCE

    def describe_launch(self, run_id: str) -> dict[str, Any]:
        """The last launch for a run: whether its process lives, how it ended, and the end of what it printed.

        Raises:
            CheckpointError: none was started from here.
        """
        launch = self._read_launch(run_id)
        process = self._processes.get(run_id)
        running, code = launch.lives, launch.exit_code
        if process is not None and process.pid == launch.pid:
            running, code = process.poll() is None, _as_exit_code(process.returncode)
        values = asdict(replace(launch, exit_code=code))
        folder = runs_folder(str(self.outputs.folder), launch.experiment) / run_id
        has_folder = (folder / "metadata").is_dir()
        return {
            **values,
            "running": running,
            "has_folder": has_folder,
            "log_tail": redact_text(read_text_end(self._place(run_id, "log"), SHOWN_LOG)),
        }

    def _launch(self, experiment: str, run_id: str, words: Sequence[str]) -> Launch:
        """Start `training-lens train WORDS` in a session of its own, so that a terminal's Ctrl-C does not reach it."""
        place = self._place(run_id, "log")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)  # of the launch before; its process keeps the file that it has open
        with place.open("xb") as log:
            process = subprocess.Popen(
                [*COMMAND, "train", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                creationflags=OWN_GROUP,
            )  # fmt: skip
        shown = redact_text(shlex.join(["training-lens", "train", *words]))
        launch = Launch(experiment, run_id, process.pid, platform.node(), read_start(process.pid), shown)
        self._processes[run_id] = process
        write_json(self._place(run_id, "json"), asdict(launch))
        Thread(target=self._await_end, args=(process, launch), name=f"launch {run_id}", daemon=True).start()
        return launch

    def _await_end(self, process: subprocess.Popen[bytes], launch: Launch) -> None:
        """Wait for a process, or it would stay a zombie, and record how it ended."""
        code = _as_exit_code(process.wait())
        with self._lock, suppress(OSError, CheckpointError):
            if self._read_launch(launch.run) == launch:
                write_json(self._place(launch.run, "json"), asdict(replace(launch, exit_code=code)))

    def _find_living(self, experiment: str, run_id: str) -> Launch | None:
        """The launch whose process trains this run, or is about to."""
        with suppress(CheckpointError):
            launch = self._read_launch(run_id)
            if launch.experiment == experiment and launch.lives:
                return launch
        return None

    def _read_launch(self, run_id: str) -> Launch:
        try:
            values = read_json(self._place(run_id, "json"))
            return Launch(**{**values, "pid": int(values["pid"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"no process was started here for the run '{run_id}'.") from error

    def _place(self, run_id: str, ending: str) -> Path:
        if not is_plain_name(run_id):
            raise CheckpointError("there is no run of that name.")
        return self.outputs.folder / LAUNCHES / f"{run_id}.{ending}"


def _as_exit_code(code: int | None) -> int | None:
    """The exit code as a shell gives it: 128 + N after signal N."""
    return code if code is None or code >= 0 else 128 - code


async def validate_settings(settings: CheckedSettings, request: Request) -> dict[str, Any]:
    """What `training-lens validate` says, run as a process; a client that hangs up ends it."""
    if settings.config is None:
        problems = [asdict(problem) for problem in settings.problems]
        return {"ok": False, "exit_code": 2, "error": "The settings have problems.", "problems": problems}
    words = ["validate", *settings.words, "--json"]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True,
            creationflags=OWN_GROUP,
        )  # fmt: skip
        try:
            await _wait_for_end(process, request)
            code = _as_exit_code(process.poll())
        finally:
            if process.poll() is None:
                kill_with_children(process.pid)
                process.wait()
        return _describe_validation(code, output, errors, shlex.join(["training-lens", *words[:-1]]))


async def _wait_for_end(process: subprocess.Popen[bytes], request: Request) -> None:
    """Until the process ends, its time is over, or the client hangs up."""
    deadline = time.monotonic() + VALIDATION_SECONDS
    while process.poll() is None and time.monotonic() < deadline and not await request.is_disconnected():
        await anyio.sleep(WAIT_SECONDS)


def _describe_validation(code: int | None, output: IO[bytes], errors: IO[bytes], command: str) -> dict[str, Any]:
    if code == 0:
        output.seek(0)
        return {"ok": True, "exit_code": 0, "result": redact_values(json.loads(output.read().splitlines()[-1]))}
    errors.seek(0)
    text = errors.read().decode("utf-8", "replace").strip()
    message = f"\n{text}".rpartition("\nerror: ")[2][-SHOWN_LOG:]  # of a crash, its traceback
    if code is None:
        message = f"not checked within {VALIDATION_SECONDS:.0f} s, so it was ended. Run it in a terminal: {command}"
    return {"ok": False, "exit_code": code, "error": redact_text(message)}


def build_launch_routes(outputs: Outputs) -> list[Route]:
    """The form of a run, and starting, stopping and resuming runs."""
    launcher = Launcher(outputs)
    return [*_build_form_routes(launcher), *_build_process_routes(launcher)]


def _build_form_routes(launcher: Launcher) -> list[Route]:
    async def check_request(request: Request) -> CheckedSettings:
        settings = read_settings(await read_body(request))
        return await run_in_threadpool(check_settings, settings, launcher.outputs.folder)

    async def send_form(request: Request) -> Response:
        return json_response(await run_in_threadpool(describe_form))

    async def send_command(request: Request) -> Response:
        checked = await check_request(request)
        command = redact_text(shlex.join(["training-lens", "train", *checked.words]))
        return json_response({"command": command, "problems": [asdict(problem) for problem in checked.problems]})

    async def send_validation(request: Request) -> Response:
        return json_response(await validate_settings(await check_request(request), request))

    async def start_run(request: Request) -> Response:
        return _send_launch(await run_in_threadpool(launcher.start_training, await check_request(request)))

    return [
        Route("/api/form", send_form),
        Route("/api/launch/command", send_command, methods=["POST"]),
        Route("/api/launch/validate", send_validation, methods=["POST"]),
        Route("/api/launch/start", start_run, methods=["POST"]),
    ]


def _build_process_routes(launcher: Launcher) -> list[Route]:
    async def send_launch(request: Request) -> Response:
        return json_response(await run_in_threadpool(launcher.describe_launch, request.path_params["run"]))

    async def stop_run(request: Request) -> Response:
        names = request.path_params["experiment"], request.path_params["run"]
        return json_response(await run_in_threadpool(launcher.stop_training, *names))

    async def resume_run(request: Request) -> Response:
        run = launcher.outputs.requested_run(request)
        return _send_launch(await run_in_threadpool(launcher.resume_training, run))

    run_path = "/api/runs/{experiment}/{run}"
    return [
        Route("/api/launch/{run}", send_launch),
        Route(f"{run_path}/stop", stop_run, methods=["POST"]),
        Route(f"{run_path}/resume", resume_run, methods=["POST"]),
    ]


def _send_launch(launch: Launch) -> Response:
    return json_response({name: getattr(launch, name) for name in ("experiment", "run", "pid", "command")})
