"""Run folders: where a run keeps everything, and how a run is found again.

{base}/experiments/{experiment}/runs/{run_id}/{artifacts,checkpoints,lens,logs,metadata,reports}
"""

from __future__ import annotations

import json
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from training_lens.errors import AdapterError, CheckpointError, ConfigurationError
from training_lens.utils.files import TEMPORARY, read_json, write_json
from training_lens.utils.formatting import nearest
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LATEST = "latest"
UNFINISHED = ("running", "interrupted", "failed")  # not pruned: that run was ended for good
PROCESS = "process.json"
STAMP = "%Y%m%dT%H%M%SZ"
BASE_ALONE = "none"  # as inference.adapter: no adapter
FEWEST_CHARACTERS = 4  # of an id that is cut short
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
    def merged(self) -> Path:
        return self.root / "artifacts" / "merged"

    @property
    def delta(self) -> Path:
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
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.logs / "samples.jsonl"

    @property
    def histograms(self) -> Path:
        return self.logs / "histograms.jsonl"

    @property
    def tracking(self) -> Path:
        return self.root / "tracking"

    @property
    def lock(self) -> Path:
        return self.metadata / "run.lock"

    def create(self) -> RunFolder:
        """Make the run's folders.

        Raises:
            ConfigurationError: see `require_new`.
        """
        self.require_new()
        for folder in (self.checkpoints, self.logs, self.metadata, self.reports):
            folder.mkdir(parents=True)
        return self

    def require_adapter(self) -> None:
        """Refuse a run without a finished adapter.

        Raises:
            CheckpointError: says what became of the run.
        """
        if not self.adapter.is_dir():
            raise CheckpointError(
                f"the run {self.root} ({self.status}) has no finished adapter. Finish it with training-lens train "
                f"--resume {self.run_id}, or give another run."
            )

    def require_new(self) -> None:
        """Refuse to begin a run here twice.

        Raises:
            ConfigurationError: a run of that id is there already; it is never written over.
        """
        if self.root.exists():
            raise ConfigurationError(
                f"output.run_id: the run '{self.run_id}' exists already at {self.root}. "
                f"Give another id, or continue it with --resume {self.run_id}."
            )

    def read_metadata(self, name: str) -> Any:
        """The content of metadata/{name}.

        Raises:
            CheckpointError: the file is missing or no JSON.
        """
        path = self.metadata / name
        try:
            return read_json(path)
        except FileNotFoundError:
            raise CheckpointError(f"{self.root} is no complete run: {path} is missing.") from None
        except ValueError as error:
            raise CheckpointError(f"{path} is no valid JSON ({error}). Restore it, or start a new run.") from error

    @property
    def started(self) -> datetime:
        """When it was started, in UTC: from its id where that is a timestamp, else from the file written first."""
        try:
            return datetime.strptime(self.run_id.split("-")[0], STAMP).replace(tzinfo=UTC)
        except ValueError:
            config = self.metadata / "config.json"
            written = (config if config.is_file() else self.root).stat().st_mtime
            return datetime.fromtimestamp(written, tz=UTC)

    @property
    def experiment(self) -> str:
        """The experiment in whose folder it is; empty for a run's folder elsewhere."""
        *_, experiments, name, runs, _ = ("", "", "", *self.root.absolute().parts)
        return name if (experiments, runs) == ("experiments", "runs") else ""

    @property
    def status(self) -> str:
        """running, finished, failed, pruned or interrupted: as the run wrote last; interrupted where its process died.

        Raises:
            CheckpointError: metadata/summary.json is missing or broken.
        """
        return "interrupted" if self.died else str(self._summary().get("status", "unknown"))

    @property
    def died(self) -> bool:
        """Whether the run's process ended without a word (SIGKILL, a crash): it wrote `running`, its lock is free.

        Where the lock cannot be tried (a read-only file system, another user's run), what the run wrote last holds.
        """
        return self._summary().get("status") == "running" and self._is_held() is False

    @property
    def process(self) -> str:
        """The process that trains it, or did so last: 'process 4711 on host forge'."""
        try:
            said = self.read_metadata(PROCESS)
            return f"process {said['pid']} on host {said['host']}"
        except (CheckpointError, KeyError, TypeError):
            return "its process is not recorded"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block this process alone trains the run, or deletes it. The kernel lets go when a process dies.

        Raises:
            CheckpointError: see `require_free`.
        """
        lock = FileLock(self.lock, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise self._taken() from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see to it that no other process trains it", self.lock, error)
        try:
            write_json(self.metadata / PROCESS, {"pid": os.getpid(), "host": platform.node()})
            yield
        finally:
            lock.release()

    def require_free(self) -> None:
        """Refuse what another process trains at this moment.

        Raises:
            CheckpointError: says which process.
        """
        if self._is_held():
            raise self._taken()

    def _taken(self) -> CheckpointError:
        return CheckpointError(
            f"the run {self.run_id} is being trained by another process ({self.process}). Wait until it ends, or stop "
            f"it. It is in {self.root}."
        )

    def _is_held(self) -> bool | None:
        """Whether a process holds the lock; None where that cannot be told, as on a read-only file system."""
        try:
            if not self.lock.exists():
                return False
            with FileLock(self.lock, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return None

    def _summary(self) -> dict[str, Any]:
        summary = self.read_metadata("summary.json")
        if not isinstance(summary, dict):
            raise CheckpointError(f"{self.metadata / 'summary.json'} holds no summary. Restore it, or start a new run.")
        return summary


def runs_folder(base_output_dir: str, experiment_name: str) -> Path:
    return Path(base_output_dir) / "experiments" / experiment_name / "runs"


def evaluations_folder(base_output_dir: str, experiment_name: str) -> Path:
    """Where judgements of models that are no run go."""
    return Path(base_output_dir) / "experiments" / experiment_name / "evaluations"


def run_folders(folder: Path) -> list[RunFolder]:
    """The runs in a runs folder, by their ids; what a killed deletion left is none."""
    places = (p for p in folder.glob("*/") if not p.name.startswith(TEMPORARY) and (p / "metadata").is_dir())
    return sorted((RunFolder(p) for p in places), key=lambda run: run.run_id)


def run_at(path: Path) -> RunFolder:
    """The run in a folder, with its id as its name: '.' and '..' have none."""
    return RunFolder(path.resolve() if path.name in ("", "..") else path)


def folders_of(base_output_dir: str, experiment_name: str | None = None) -> list[RunFolder]:
    """The folders of the runs of one experiment, or of all.

    Raises:
        ConfigurationError: there is no such experiment; names the nearest.
    """
    experiments = sorted(path.name for path in (Path(base_output_dir) / "experiments").glob("*/"))
    if experiment_name is not None and experiment_name not in experiments:
        there = f"there are {', '.join(experiments)}" if experiments else "there is none yet"
        raise ConfigurationError(
            f"no experiment '{experiment_name}' in {base_output_dir}: {there}.{_hint(experiment_name, experiments)}"
        )
    names = experiments if experiment_name is None else [experiment_name]
    return [run for name in names for run in run_folders(runs_folder(base_output_dir, name))]


def find_run(
    reference: str, base_output_dir: str, experiment_name: str | None = None, *, finished: bool | None = None
) -> RunFolder:
    """The run that `reference` means; the one place that says so, for every command and for Python.

    That is a path to a run folder; a run's id, or the first characters of one; `latest`, the run that started last; or
    an experiment's name, of which it is the run that started last.

    Args:
        experiment_name: the experiment that was named; None: all of them.
        finished: what the run is for: True to use its adapter, False to resume it, None to look at it. `latest` is the
            same run for all of them, and is refused where it cannot be used so.

    Raises:
        CheckpointError: there is no such run, several are meant, or the last one cannot be used; names what there is.
    """
    if (Path(reference).expanduser() / "metadata").is_dir():
        return run_at(Path(reference).expanduser())
    everywhere = folders_of(base_output_dir)
    inside = [run for run in everywhere if experiment_name in (None, run.experiment)]
    place = f"experiment {experiment_name} of {base_output_dir}" if experiment_name else base_output_dir
    if reference == LATEST:
        return _take_last(inside, place, finished)
    of_experiment = [run for run in everywhere if run.experiment == reference]
    found = _match_ids(reference, inside) or _match_ids(reference, everywhere)
    if of_experiment:
        found.append(_take_last(of_experiment, f"experiment {reference}", None if found else finished))
    return _require_one({run.root: run for run in found}, reference, everywhere, place)


def _match_ids(reference: str, runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs of that id, or else those whose ids begin so."""
    exact = [run for run in runs if run.run_id == reference]
    begun = [run for run in runs if run.run_id.startswith(reference)] if len(reference) >= FEWEST_CHARACTERS else []
    return exact or begun


def _require_one(
    found: Mapping[Path, RunFolder], reference: str, everywhere: Sequence[RunFolder], place: str
) -> RunFolder:
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise CheckpointError(
            f"'{reference}' may mean {len(found)} runs; give the folder of one: {', '.join(map(str, found))}."
        )
    beside = [str(p) for p in Path(reference).parent.glob("*/")] if "/" in reference else []
    known = {LATEST, *(run.run_id for run in everywhere), *(run.experiment for run in everywhere), *beside}
    raise CheckpointError(
        f"no run '{reference}' in {place} ({len(everywhere)} runs in all), no experiment of that name, and no run "
        "folder at that path. Give output.base_output_dir if it is elsewhere."
        f"{_hint(reference.rstrip('/'), sorted(known - {reference.rstrip('/')}))}"
    )


def _take_last(runs: Sequence[RunFolder], place: str, finished: bool | None) -> RunFolder:
    """The run that started last, if it can be used as `finished` says."""
    if not runs:
        raise CheckpointError(
            f"no run in {place} yet. Train one, give output.base_output_dir and output.experiment_name if it is "
            "elsewhere, or the run's path."
        )
    by_age = sorted(runs, key=lambda run: (run.started, run.run_id))
    last, usable = by_age[-1], (("finished",) if finished else UNFINISHED)
    if finished is None or read_status(last) in usable:
        return last
    others = [run for run in by_age[:-1] if read_status(run) in usable]
    what = "finished" if finished else "unfinished"
    instead = f"The last {what} one is {others[-1].run_id}" if others else f"No run in {place} is {what}"
    remedy = f", or finish it with training-lens train --resume {last.run_id}" if _can_resume(last, finished) else ""
    raise CheckpointError(
        f"the run that started last in {place} is {last.run_id} ({read_status(last)}); expected one that is {what}. "
        f"{instead}{remedy}."
    )


def _can_resume(run: RunFolder, finished: bool | None) -> bool:
    return bool(finished) and read_status(run) in ("interrupted", "failed")


def read_status(run: RunFolder) -> str:
    """The run's status; unknown where its summary cannot be read."""
    try:
        return run.status
    except CheckpointError:
        return "unknown"


def find_adapter_run(adapter: str, base_output_dir: str, experiment_name: str | None = None) -> RunFolder:
    """The run that `inference.adapter` names, with a finished adapter.

    Raises:
        CheckpointError: see `find_run`; or it has no finished adapter.
        AdapterError: it is a folder, but neither that of an adapter nor that of a run.
    """
    try:
        run = find_run(adapter, base_output_dir, experiment_name, finished=True)
    except CheckpointError:
        if Path(adapter).expanduser().is_dir():
            raise AdapterError(
                f"inference.adapter: '{adapter}' holds neither adapter_config.json (an adapter folder) nor metadata/ "
                "(a run's folder)."
            ) from None
        raise
    run.require_adapter()
    return run


def uses_own_model(adapter: str) -> bool:
    """Whether `inference.adapter` leaves model, template and domains to the config, and not to a run."""
    return adapter == BASE_ALONE or (Path(adapter).expanduser() / "adapter_config.json").is_file()


def _hint(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return f" Did you mean {close}?" if close else ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, each with its `step`; a line that is none, as a kill cuts the last, is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
