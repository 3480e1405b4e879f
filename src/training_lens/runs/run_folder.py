"""Run folders: the paths of a run, its status, and the lock of the process that trains it.

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
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.utils.files import TEMPORARY, atomic_folder, list_files, read_json, sweep_temporaries, write_json
from training_lens.utils.integrity import read_sealed, record_hashes, require_intact, strip_checksum
from training_lens.utils.logging import get_logger
from training_lens.utils.names import is_printable

logger = get_logger(__name__)
LATEST = "latest"
UNFINISHED = ("running", "interrupted", "failed")  # not pruned: that run was ended for good
PROCESS = "process.json"
SCALE_RECORD = "manifest.json"  # of artifacts/scaled: the scale, and the hashes of the adapter beside it
STAMP = "%Y%m%dT%H%M%SZ"
LOCK_SECONDS = 2.0  # reading the status takes the lock for an instant, too


def new_run_id() -> str:
    """A UTC timestamp with a short random tail; sorts by time: '20261120T203605Z-5f3a'."""
    return f"{datetime.now(UTC):{STAMP}}-{secrets.token_hex(2)}"


def parse_start_time(run_id: str) -> datetime | None:
    """The time in a run's id, see `new_run_id`; None for an id that was given by the user or a sweep."""
    try:
        return datetime.strptime(run_id.split("-")[0], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return None


class _Place:
    """A path inside of a run's folder, as an attribute of `RunFolder`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.root / self._name


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    adapter = _Place("artifacts/adapter")
    scaled = _Place("artifacts/scaled")
    combination_record = _Place("artifacts/adapter/combination.json")
    tokenizer = _Place("artifacts/tokenizer")
    merged_model = _Place("artifacts/merged")
    weight_delta = _Place("artifacts/delta")
    exported = _Place("artifacts/exported")
    checkpoints = _Place("checkpoints")
    lens = _Place("lens")
    states = _Place("lens/states")
    logs = _Place("logs")
    metrics_file = _Place("logs/metrics.jsonl")
    samples_file = _Place("logs/samples.jsonl")
    histograms_file = _Place("logs/histograms.jsonl")
    findings_file = _Place("logs/findings.jsonl")
    evaluations_file = _Place("logs/evaluations.jsonl")
    metadata = _Place("metadata")
    base_record = _Place("metadata/base.json")
    lock_file = _Place("metadata/run.lock")
    reports = _Place("reports")
    tracking = _Place("tracking")

    @property
    def run_id(self) -> str:
        return self.root.name

    def create(self, fill: Callable[[RunFolder], object] = lambda _: None) -> RunFolder:
        """Create the run's folder atomically, in place of one whose run never began; see `require_new`.

        `fill` writes the first files into the folder that it is given, which then becomes this one.
        """
        self.require_new()
        with atomic_folder(self.root, existing="replace" if self.root.exists() else "refuse") as root:
            building = RunFolder(root)
            for folder in (building.checkpoints, building.logs, building.metadata, building.reports):
                folder.mkdir()
            fill(building)
        return self

    def write_metadata(self, name: str, value: Any) -> None:
        """Write metadata/{name} as JSON and record its hash."""
        write_json(self.metadata / name, value)
        record_hashes(self.root, [self.metadata / name])

    @property
    def has_begun(self) -> bool:
        """Whether it has a status or a result. Processes of earlier versions could die before they wrote either."""
        results = (self.logs, self.checkpoints, self.root / "artifacts")
        return (self.metadata / "summary.json").exists() or any(list_files(folder) for folder in results)

    @property
    def served_adapter(self) -> Path:
        """The adapter that answers: at the scale that was chosen by `training-lens knob --choose`, else as trained."""
        return self.scaled / "adapter" if self.scaled.is_dir() else self.adapter

    @property
    def adapter_scale(self) -> float:
        """What the update of `served_adapter` was multiplied by; 1 is as trained.

        Raises:
            CheckpointError: its record is missing or damaged.
        """
        if not self.scaled.is_dir():
            return 1.0
        try:
            return float(read_sealed(self.scaled / SCALE_RECORD, required=True)["scale"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.scaled / SCALE_RECORD} cannot be read ({error}). Choose the scale again: "
                f"training-lens knob {self.root} --choose 1 takes it back."
            ) from error

    def require_adapter(self) -> None:
        """Check that the run has a finished, intact adapter.

        Raises:
            CheckpointError: it has none (says its status), or a file of adapter or tokenizer is damaged.
        """
        if not self.adapter.is_dir():
            raise CheckpointError(
                f"the run {self.root} ({self.status}) has no finished adapter. Finish it with training-lens train "
                f"--resume {self.run_id}, or give another run."
            )
        require_intact(self.adapter)
        require_intact(self.served_adapter)
        require_intact(self.tokenizer)

    def require_new(self) -> None:
        """Check that no run of this id exists: it is never overwritten."""
        if self.root.exists() and (self.has_begun or self._is_locked()):
            raise ConfigurationError(
                f"output.run_id: the run '{self.run_id}' exists already at {self.root}. "
                f"Give another id, or continue it with --resume {self.run_id}."
            )

    def read_metadata(self, name: str) -> Any:
        """The content of metadata/{name}.

        Raises:
            CheckpointError: the file is missing, not JSON, or not what the run wrote.
        """
        path = self.metadata / name
        try:
            require_intact(path)
            return read_checked_json(path, "Restore it, or start a new run.")
        except FileNotFoundError:
            advice = f"Its process died before it began: start it again, with output.run_id={self.run_id} if you like."
            if self.has_begun:
                advice = f"training-lens doctor {self.root} says what can be repaired."
            raise CheckpointError(f"{self.root} is not a complete run: {path} is missing. {advice}") from None

    @property
    def start_time(self) -> datetime:
        """When the run started, in UTC: from its id if that is a timestamp, else the time of the first file."""
        if time := parse_start_time(self.run_id):
            return time
        config = self.metadata / "config.json"
        return datetime.fromtimestamp((config if config.is_file() else self.root).stat().st_mtime, tz=UTC)

    @property
    def experiment_name(self) -> str:
        """The experiment that the folder belongs to; empty for a run folder elsewhere."""
        *_, experiments, name, runs, _ = ("", "", "", *self.root.absolute().parts)
        return name if (experiments, runs) == ("experiments", "runs") else ""

    @property
    def status(self) -> str:
        """running, finished, failed, pruned or interrupted, as the run wrote last; interrupted if its process died.

        Raises:
            CheckpointError: metadata/summary.json is missing or broken.
        """
        return "interrupted" if self.has_died else str(self._read_summary().get("status", "unknown"))

    @property
    def has_died(self) -> bool:
        """Whether the run's process was killed or crashed: the status says `running`, but the lock is free.

        False where the lock cannot be tried (read-only file system, another user's run).
        """
        return self._read_summary().get("status") == "running" and self._is_locked() is False

    @property
    def resume_command(self) -> str:
        """The command that resumes this run."""
        return shlex.join(["training-lens", "train", "--resume", str(self.root)])

    @property
    def process_label(self) -> str:
        """The process that trains the run, or last did: 'process 4711 on host forge'."""
        try:
            process = self.read_metadata(PROCESS)
            return f"process {process['pid']} on host {process['host']}"
        except (CheckpointError, KeyError, TypeError):
            return "its process is not recorded"

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Hold the run's lock in the block, to train or delete it. The kernel frees the lock when the process dies."""
        lock = FileLock(self.lock_file, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise self._lock_error() from None
        except OSError as error:  # a file system without locks
            logger.warning(
                "%s cannot be locked (%s): make sure that no other process trains this run", self.lock_file, error
            )
        try:
            for folder in {path.parent for path in self.root.rglob(f"{TEMPORARY}*")}:
                sweep_temporaries(folder)
            write_json(self.metadata / PROCESS, {"pid": os.getpid(), "host": platform.node()})
            yield
        finally:
            lock.release()

    def require_free(self) -> None:
        """Check that no other process trains the run, or say which."""
        if self._is_locked():
            raise self._lock_error()

    def _lock_error(self) -> CheckpointError:
        return CheckpointError(
            f"the run {self.run_id} is being trained by another process ({self.process_label}). Wait until it ends, or "
            f"stop it. It is in {self.root}."
        )

    def _is_locked(self) -> bool | None:
        """Whether a process holds the lock; None if unknown, as on a file system without locks.

        The file is only read where the system allows it: who looks at a run that is being deleted makes it no new one.
        """
        try:
            return _is_file_locked(self.lock_file)
        except FileNotFoundError:
            return False
        except OSError:
            return None

    def _read_summary(self) -> dict[str, Any]:
        summary = self.read_metadata("summary.json")
        if not isinstance(summary, dict):
            raise CheckpointError(f"{self.metadata / 'summary.json'} holds no summary. Restore it, or start a new run.")
        return summary


def _is_file_locked(path: Path) -> bool:
    """Whether a process holds a `FileLock`, without making its file: a shared lock is refused beside theirs."""
    try:
        import fcntl
    except ImportError:  # Windows
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False  # closing it frees the lock


def describe_scale(run: RunFolder) -> str:
    """What `adapter_scale` does to the adapter, as a sentence."""
    return f"the adapter's update is multiplied by {run.adapter_scale:g}, the scale chosen with training-lens knob"


def read_checked_json(path: Path, remedy: str = "Delete it, or write it again.") -> Any:
    """The content of a JSON file of a run; a `CheckpointError` if it is not JSON, or not what was written."""
    try:
        value = read_json(path)
        return strip_checksum(value, path) if isinstance(value, dict) else value
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}). {remedy}") from error


def runs_folder(base_output_dir: str, experiment_name: str) -> Path:
    return Path(base_output_dir) / "experiments" / experiment_name / "runs"


def list_run_folders(folder: Path) -> list[RunFolder]:
    """The runs in a runs folder, sorted by id, without leftovers of a killed deletion.

    Ids of earlier versions that `check_run_id` would refuse are included, unless they do not print.
    """
    places = (p for p in list_folders(folder) if not p.name.startswith(TEMPORARY) and (p / "metadata").is_dir())
    return sorted((RunFolder(p) for p in places), key=lambda run: run.run_id)


def list_folders(folder: Path) -> Iterator[Path]:
    """The subfolders of a folder; those whose names do not print are skipped with a warning."""
    for path in folder.glob("*/"):
        if is_printable(path.name):
            yield path
        else:
            logger.warning("%s: skipped the folder %r, because its name does not print: rename it", folder, path.name)
