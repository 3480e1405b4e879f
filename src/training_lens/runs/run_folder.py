"""Run folders: where a run keeps everything, and how a run is found again.

{base}/experiments/{experiment}/runs/{run_id}/{artifacts,checkpoints,lens,logs,metadata,reports}
"""

from __future__ import annotations

import os
import platform
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.journal import warn_of_damaged_lines
from training_lens.utils.files import TEMPORARY, atomic_folder, list_files, read_json, sweep_temporaries, write_json
from training_lens.utils.integrity import read_line, record_hashes, require_intact, strip_checksum
from training_lens.utils.limits import read_text
from training_lens.utils.logging import get_logger
from training_lens.utils.names import is_printable

logger = get_logger(__name__)
LATEST = "latest"
UNFINISHED = ("running", "interrupted", "failed")  # not pruned: that run was ended for good
PROCESS = "process.json"
STAMP = "%Y%m%dT%H%M%SZ"
LOCK_SECONDS = 2.0  # a process that asks for the status holds the lock for an instant, too


def new_run_id() -> str:
    """A UTC timestamp with a short random tail; sorts by time: '20261120T203605Z-5f3a'."""
    return f"{datetime.now(UTC):{STAMP}}-{secrets.token_hex(2)}"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def adapter(self) -> Path:
        return self.root / "artifacts" / "adapter"

    @property
    def tokenizer(self) -> Path:
        return self.root / "artifacts" / "tokenizer"

    @property
    def merged_model(self) -> Path:
        return self.root / "artifacts" / "merged"

    @property
    def weight_delta(self) -> Path:
        return self.root / "artifacts" / "delta"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def lens(self) -> Path:
        return self.root / "lens"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata"

    @property
    def base_record(self) -> Path:
        return self.metadata / "base.json"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def metrics_file(self) -> Path:
        return self.logs / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.logs / "samples.jsonl"

    @property
    def histograms_file(self) -> Path:
        return self.logs / "histograms.jsonl"

    @property
    def evaluations_file(self) -> Path:
        return self.logs / "evaluations.jsonl"

    @property
    def tracking(self) -> Path:
        return self.root / "tracking"

    @property
    def lock_file(self) -> Path:
        return self.metadata / "run.lock"

    def create(self, fill: Callable[[RunFolder], object] = lambda _: None) -> RunFolder:
        """Make the run's folder, whole or not at all; a run that never began makes room for it.

        Args:
            fill: writes the first files into the folder that it is given, which then becomes this one.

        Raises:
            ConfigurationError: see `require_new`; OutputError: another process made it meanwhile.
        """
        self.require_new()
        with atomic_folder(self.root, existing="replace" if self.root.exists() else "refuse") as root:
            building = RunFolder(root)
            for folder in (building.checkpoints, building.logs, building.metadata, building.reports):
                folder.mkdir()
            fill(building)
        return self

    def write_metadata(self, name: str, value: Any) -> None:
        """Write metadata/{name} as JSON, and record its hash."""
        write_json(self.metadata / name, value)
        record_hashes(self.root, [self.metadata / name])

    @property
    def has_begun(self) -> bool:
        """Whether it has a status or a result: a process of earlier versions may have died before it wrote either."""
        results = (self.logs, self.checkpoints, self.root / "artifacts")
        return (self.metadata / "summary.json").exists() or any(list_files(folder) for folder in results)

    def require_adapter(self) -> None:
        """Refuse a run without a finished adapter.

        Raises:
            CheckpointError: says what became of the run, or which file of adapter or tokenizer is damaged.
        """
        if not self.adapter.is_dir():
            raise CheckpointError(
                f"the run {self.root} ({self.status}) has no finished adapter. Finish it with training-lens train "
                f"--resume {self.run_id}, or give another run."
            )
        require_intact(self.adapter)
        require_intact(self.tokenizer)

    def require_new(self) -> None:
        """Refuse to begin a run here twice.

        Raises:
            ConfigurationError: a run of that id is there already; it is never written over.
        """
        if self.root.exists() and (self.has_begun or self._is_locked()):
            raise ConfigurationError(
                f"output.run_id: the run '{self.run_id}' exists already at {self.root}. "
                f"Give another id, or continue it with --resume {self.run_id}."
            )

    def read_metadata(self, name: str) -> Any:
        """The content of metadata/{name}.

        Raises:
            CheckpointError: the file is missing, no JSON, or not what the run wrote.
        """
        path = self.metadata / name
        try:
            require_intact(path)
            value = read_json(path)
            return strip_checksum(value, path) if isinstance(value, dict) else value
        except FileNotFoundError:
            raise CheckpointError(f"{self.root} is no complete run: {path} is missing. {self._repair_advice}") from None
        except ValueError as error:
            raise CheckpointError(f"{path} is no valid JSON ({error}). Restore it, or start a new run.") from error

    @property
    def _repair_advice(self) -> str:
        if self.has_begun:
            return f"training-lens doctor {self.root} says what can be repaired."
        return f"Its process died before it began: start it again, where you like with output.run_id={self.run_id}."

    @property
    def start_time(self) -> datetime:
        """When it was started, in UTC: from its id where that is a timestamp, else from the file written first."""
        try:
            return datetime.strptime(self.run_id.split("-")[0], STAMP).replace(tzinfo=UTC)
        except ValueError:
            config = self.metadata / "config.json"
            written = (config if config.is_file() else self.root).stat().st_mtime
            return datetime.fromtimestamp(written, tz=UTC)

    @property
    def experiment_name(self) -> str:
        """The experiment in whose folder it is; empty for a run's folder elsewhere."""
        *_, experiments, name, runs, _ = ("", "", "", *self.root.absolute().parts)
        return name if (experiments, runs) == ("experiments", "runs") else ""

    @property
    def status(self) -> str:
        """running, finished, failed, pruned or interrupted: as the run wrote last; interrupted where its process died.

        Raises:
            CheckpointError: metadata/summary.json is missing or broken.
        """
        return "interrupted" if self.has_died else str(self._read_summary().get("status", "unknown"))

    @property
    def has_died(self) -> bool:
        """Whether the run's process ended without a word (SIGKILL, a crash): it wrote `running`, its lock is free.

        Where the lock cannot be tried (a read-only file system, another user's run), what the run wrote last holds.
        """
        return self._read_summary().get("status") == "running" and self._is_locked() is False

    @property
    def resume_command(self) -> str:
        """What is typed in this folder to go on with it."""
        return shlex.join(["training-lens", "train", "--resume", str(self.root)])

    @property
    def process_label(self) -> str:
        """The process that trains it, or did so last: 'process 4711 on host forge'."""
        try:
            said = self.read_metadata(PROCESS)
            return f"process {said['pid']} on host {said['host']}"
        except (CheckpointError, KeyError, TypeError):
            return "its process is not recorded"

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Within the block this process alone trains the run, or deletes it. The kernel lets go when a process dies.

        Raises:
            CheckpointError: see `require_free`.
        """
        lock = FileLock(self.lock_file, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise self._lock_error() from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see to it that no other process trains it", self.lock_file, error)
        try:
            for folder in {path.parent for path in self.root.rglob(f"{TEMPORARY}*")}:
                sweep_temporaries(folder)
            write_json(self.metadata / PROCESS, {"pid": os.getpid(), "host": platform.node()})
            yield
        finally:
            lock.release()

    def require_free(self) -> None:
        """Refuse what another process trains at this moment.

        Raises:
            CheckpointError: says which process.
        """
        if self._is_locked():
            raise self._lock_error()

    def _lock_error(self) -> CheckpointError:
        return CheckpointError(
            f"the run {self.run_id} is being trained by another process ({self.process_label}). Wait until it ends, or "
            f"stop it. It is in {self.root}."
        )

    def _is_locked(self) -> bool | None:
        """Whether a process holds the lock; None where that cannot be told, as on a read-only file system."""
        try:
            if not self.lock_file.exists():
                return False
            with FileLock(self.lock_file, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return None

    def _read_summary(self) -> dict[str, Any]:
        summary = self.read_metadata("summary.json")
        if not isinstance(summary, dict):
            raise CheckpointError(f"{self.metadata / 'summary.json'} holds no summary. Restore it, or start a new run.")
        return summary


def runs_folder(base_output_dir: str, experiment_name: str) -> Path:
    return Path(base_output_dir) / "experiments" / experiment_name / "runs"


def evaluations_folder(base_output_dir: str, experiment_name: str) -> Path:
    """Where judgements of models that are no run go."""
    return Path(base_output_dir) / "experiments" / experiment_name / "evaluations"


def list_run_folders(folder: Path) -> list[RunFolder]:
    """The runs in a runs folder, by their ids; what a killed deletion left is none.

    Ids of earlier versions, which `check_run_id` would refuse, are among them, but for those that do not print.
    """
    places = (p for p in list_folders(folder) if not p.name.startswith(TEMPORARY) and (p / "metadata").is_dir())
    return sorted((RunFolder(p) for p in places), key=lambda run: run.run_id)


def list_folders(folder: Path) -> Iterator[Path]:
    """The folders in a folder; those whose names do not print as they are, are left out with a warning."""
    for path in folder.glob("*/"):
        if is_printable(path.name):
            yield path
        else:
            logger.warning("%s: left out the folder %r, whose name does not print: rename it", folder, path.name)


def open_run_folder(path: Path) -> RunFolder:
    """The run in a folder, with its id as its name: '.' and '..' have none."""
    return RunFolder(path.resolve() if path.name in ("", "..") else path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, each with its `step`. One that is none is left out: a kill cuts the last; of
    others a warning says so, and of lines that are missing behind the last one of a finished run.
    """
    texts = read_text(path).splitlines()
    lines = [values if values and isinstance(values.get("step"), int) else None for values in map(read_line, texts)]
    if None in lines[:-1]:
        warn_of_damaged_lines(path, tuple(number for number, line in enumerate(lines, 1) if line is None))
    found = [line for line in lines if line is not None]
    _warn_of_missing_steps(path, max((line["step"] for line in found), default=0), _finished_step_count(path))
    return found


@lru_cache(maxsize=64)
def _warn_of_missing_steps(path: Path, last_step: int, steps: int) -> None:
    if last_step < steps:
        logger.warning("%s is damaged: it ends with step %d of %d, and the rest is missing", path, last_step, steps)


def _finished_step_count(metrics_file: Path) -> int:
    """The steps of the run that a metrics.jsonl is of; 0 where it is not finished, or not known."""
    try:
        summary = RunFolder(metrics_file.parent.parent).read_metadata("summary.json")
        return int(summary["steps"]) if summary["status"] == "finished" else 0
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return 0
