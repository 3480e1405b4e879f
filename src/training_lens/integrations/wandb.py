"""Weights & Biases, online or offline, with the real client: one run there for one run here, under one id."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

from training_lens.errors import CheckpointError, IntegrationError
from training_lens.integrations.record import RunRecord
from training_lens.integrations.tracker import BATCH, Record, Tracker, require_packages
from training_lens.integrations.wandb_media import build_artifacts, build_lens_media, build_row
from training_lens.runs.journal import JournalEntry
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import PROCESS
from training_lens.utils.formatting import describe_error, strip_full_stop

INIT_SECONDS = 30.0  # for the first answer of the server
REFUSED = re.compile(r"error 40[13]\b")  # HTTP: the key is wrong, or has no right to write there
NO_METADATA = "http://127.0.0.1:9"  # in place of a cloud's metadata server, which wandb-core would ask
OWN_RUN_KEYS = ("run_dir",)  # of the summary: a path of this machine


class WandBIntegration(Tracker):
    """Sends a run to Weights & Biases, or writes it as a W&B offline run.

    What was sent counts once W&B has finished the run: a client that dies before is begun again from where the last
    finished one came to. Rows have the training step as W&B's step, so that a server drops those that it has.

    Args:
        run: what is shown.
    """

    name = "wandb"

    def __init__(self, run: RunRecord) -> None:
        self.settings = run.config.tracking.wandb
        super().__init__(run)
        self._run: Any = None  # W&B's, from the first record on
        self._begun = False  # whether the client has a process
        self._held: list[tuple[str, JournalEntry]] = []
        self._ended = False
        self._stopped = Event()

    @property
    def destination(self) -> str:
        return f"{self.settings.mode} {self.settings.entity or ''} {self.settings.project}"

    @property
    def wandb_id(self) -> str:
        """The run's id there: the same after a resume, and from another machine."""
        return build_wandb_id(self.run.experiment, self.run.run_id)

    def require(self) -> None:
        """See `Integration.require`: the package, and a key for a run that goes online."""
        require_packages("wandb", "wandb")
        if self.settings.mode == "online":
            import wandb

            _require_key(wandb)

    def deliver(self, ended: bool) -> None:
        """See `Integration.deliver`."""
        self._ended = ended
        super().deliver(ended)

    def log(self, records: Sequence[Record]) -> None:
        """One row for each step: `_next_entries` gives whole steps, in order."""
        for step, those in groupby(records, key=lambda record: record.step):
            self._log_row(step, build_row(list(those)))

    def end(self) -> None:
        """The summary, what the lens saw, the artifacts; and then all must be there."""
        if shown := build_lens_media(self.run):
            self._log_row(self._last, shown)
        kept = {key: value for key, value in self.run.summary.items() if key not in OWN_RUN_KEYS}
        self._run.summary.update(kept)
        for artifact in build_artifacts(self.run, self.wandb_id):
            self._run.log_artifact(artifact)
        self._finish_run()

    def close(self) -> None:
        """End the client's process; what it did not send is sent by the next one."""
        self._held = []
        if self._begun:
            import wandb

            self._run, self._begun = None, False
            with suppress(Exception):  # it may be dead
                wandb.teardown(exit_code=1)

    def _next_entries(self) -> list[tuple[str, JournalEntry]]:
        """The entries of whole steps: those behind which every journal was read on."""
        while new := super()._next_entries():
            self._held = sorted([*self._held, *new], key=lambda named: named[1].step)
            if whole := self._take_steps(self._read_through(new)):
                return whole
        return self._take_steps(None) if self._ended else []

    def _read_through(self, new: Sequence[tuple[str, JournalEntry]]) -> int:
        """The step before which there is nothing more: the metrics have a line for each, and were read first."""
        full = [name for name in self._readers if sum(named[0] == name for named in new) == BATCH[name]]
        return min(self._readers[name].position.step for name in ("metrics", *full))

    def _take_steps(self, before: int | None) -> list[tuple[str, JournalEntry]]:
        count = len(self._held) if before is None else sum(entry.step < before for _, entry in self._held)
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _end_key(self) -> str:
        """Another end after each evaluation: what was sent counts once W&B has finished the run again."""
        evaluations = self.run.folder.evaluations_file
        lines = len(read_metrics(evaluations)) if evaluations.is_file() else 0
        return f"{super()._end_key()}-{lines}" if lines else super()._end_key()

    def _save_positions(self, **more: Any) -> None:
        """Only what a finished run of W&B holds is sent."""
        if more:
            super()._save_positions(shift=self._shift, **more)

    def open(self) -> None:
        """Begin W&B's run, or go on with it."""
        import wandb

        self._stopped.clear()

        kept = self.cursor.load()
        if unfinished := kept.pop("unfinished", None):
            shutil.rmtree(unfinished, ignore_errors=True)
        self._last = max((step for step, _ in kept.get("positions", {}).values()), default=-1)
        self._shift = kept.get("shift", 0)
        folder = self._client_folder
        folder.mkdir(parents=True, exist_ok=True)
        # The client's own folders are known by the environment alone; in the home they would outlive the run.
        os.environ |= {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache")}
        logging.getLogger("wandb").disabled = True  # its file may be on a full disk: a traceback for each line
        self._begun = True
        with _explain_errors(wandb):
            self._run = wandb.init(
                id=self.wandb_id, resume="allow", reinit="create_new", dir=str(folder), config=self.run.settings,
                mode=self.settings.mode, project=self.settings.project, entity=self.settings.entity,
                group=self.settings.group or self.run.sweep, name=self.settings.name or self.run.run_id,
                tags=self.settings.tags, settings=self._client_settings(wandb),
            )  # fmt: skip
        self.cursor.save({**kept, "unfinished": self._run.settings.sync_dir})
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _client_settings(self, wandb: Any) -> Any:
        """How the client behaves: quiet, without code, git and facts about the machine but the training's own use."""
        pid, stopped = self._training_process(), self._stopped
        return wandb.Settings(
            init_timeout=INIT_SECONDS, finish_timeout=self._finish_seconds, finish_timeout_raises=True,
            console="off", silent=True, quiet=True, save_code=False, disable_code=True, disable_git=True,
            disable_job_creation=True, label_disable=True, host="", stop_on_fatal_error=True,
            stop_fn=lambda: stopped.set(), x_disable_meta=True, x_save_requirements=False,
            x_disable_stats=pid is None, x_stats_pid=pid or os.getpid(), x_stats_disk_paths=[],
            x_stats_coreweave_metadata_base_url=NO_METADATA,
        )  # fmt: skip

    def _training_process(self) -> int | None:
        """The process whose use of the machine is shown; None once it has ended."""
        with suppress(CheckpointError, KeyError, TypeError):
            return int(self.run.folder.read_metadata(PROCESS)["pid"]) if self.run.status == "running" else None
        return None

    @property
    def _finish_seconds(self) -> float:
        """How long W&B may take for the rest: an adapter of gigabytes goes out at the end."""
        return max(600.0, self.run.config.tracking.wait_seconds)

    @property
    def _client_folder(self) -> Path:
        """Where the client writes: offline runs, or what is deleted when all of it is online."""
        if self.settings.mode == "online":
            return self.run.tracking_folder(self.name).absolute() / "online"
        return Path(self.settings.folder or self.run.tracking_folder(self.name)).absolute()

    def _log_row(self, step: int, values: dict[str, Any]) -> None:
        """A row. W&B's step only grows: it is the training step, moved on by one for each row that came late."""
        self._shift += step <= self._last
        self._last = max(step, self._last)
        self._run.log(values | {"step": step}, step=self._last + self._shift, commit=True)
        if self._stopped.is_set():
            raise IntegrationError("W&B takes no more of this run.")

    def _finish_run(self) -> None:
        """W&B has everything, or this raises."""
        import wandb

        folder, step = Path(self._run.settings.sync_dir), self._last + self._shift
        with _explain_errors(wandb):
            self._run.finish(exit_code=0 if self.run.status == "finished" else 1)
        if self._stopped.is_set():
            raise IntegrationError("W&B did not take all of this run.")
        if self.settings.mode == "offline":
            require_written(folder, step)
        else:
            shutil.rmtree(self._client_folder, ignore_errors=True)
        kept = self.cursor.load()
        kept.pop("unfinished", None)
        self.cursor.save(kept)


def build_wandb_id(experiment: str, run_id: str) -> str:
    """W&B's id of a run: of characters that it allows, and another one for a run of that name elsewhere."""
    known = hashlib.sha256(f"{experiment}/{run_id}".encode()).hexdigest()
    return f"{_replace_characters(run_id)[:64]}-{known[:6]}"


def _replace_characters(name: str) -> str:
    """A name of the characters that W&B's ids, and files, may have."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def _require_key(wandb: Any) -> None:
    from wandb.sdk.lib.wbauth import authenticate_session

    host = wandb.setup().settings.base_url
    try:
        key = authenticate_session(host=host, source="", prompt=False, update_session=False)
    except wandb.errors.Error as error:
        raise IntegrationError(f"W&B: {describe_error(error)}") from error
    if key is None:
        raise IntegrationError(
            f"there is no key for {host}: set WANDB_API_KEY, run `wandb login`, or give tracking.wandb.mode=offline."
        )


@contextmanager
def _explain_errors(wandb: Any) -> Iterator[None]:
    """The client's errors as ours, with what to do."""
    try:
        yield
    except TimeoutError as error:
        raise IntegrationError(
            f"W&B did not take all of the run in time ({strip_full_stop(describe_error(error))})."
        ) from error
    except wandb.errors.Error as error:
        refused = isinstance(error, wandb.errors.AuthenticationError) or REFUSED.search(str(error))
        if refused:
            raise IntegrationError(
                f"W&B refuses the key, or lets it not write there ({strip_full_stop(describe_error(error))}). Run "
                "`wandb login`, or set WANDB_API_KEY, and see tracking.wandb.entity.",
                lasting=True,
            ) from error
        lasting = isinstance(error, wandb.errors.UsageError)
        raise IntegrationError(
            f"W&B does not begin or end the run ({strip_full_stop(describe_error(error))}).", lasting=lasting
        ) from error


def require_written(folder: Path, step: int) -> None:
    """Read an offline run back with W&B's own reader: on a full disk its writer drops records and says nothing.

    Raises:
        IntegrationError: the run's file lacks its end, or its last row.
    """
    from wandb.util import get_core_path

    (file,) = folder.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--summary", "--json", "--no-observability", "--run-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INIT_SECONDS, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise IntegrationError(f"{file} cannot be read back ({done.stderr.strip()[-200:]}).") from None
    if found["exit_code"] is None or found["step"] != step:
        raise IntegrationError(f"{file} is not whole: is the disk full? It is written anew.")
