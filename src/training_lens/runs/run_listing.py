"""Runs read back as plain values, to be listed, sorted and compared."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.housekeeping import read_checked_json, read_tags
from training_lens.runs.run_folder import RunFolder, read_metrics
from training_lens.runs.run_lookup import find_run, find_run_folders
from training_lens.utils.formatting import nearest_name
from training_lens.utils.nested import find_differences, flatten_sections

BROKEN = "broken"
REPORTS = ("compare.json", "evaluation.json")
MEASURED = ("base.", "adapter.", "delta.", "by_domain.", "controls.", "forgetting.", "tasks.")  # of a report
LOWER_IS_BETTER = ("loss", "perplexity", "seconds", "bytes", "bits", "error", "distance", "_kl")
NOT_COMPARED = ("output.run_id",)


@dataclass(frozen=True)
class RunOverview:
    """One run, as its files tell it.

    `status` is `RunFolder.status`, or broken where config or summary cannot be read; `detail` says what happened to
    it, or what is wrong with its files. `start_time` is UTC. `metrics` are the finite numbers of its summary (of
    metrics.jsonl until that is written) and of its reports; `config` are its settings; both by dotted key. Losses are
    nats per supervised token. The summary wins over reports, and a later report over an earlier one. `mirror_place`
    is the URL of a run in a mirror; `folder` then holds only its small files.
    """

    folder: RunFolder
    status: str
    detail: str
    start_time: datetime
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    mirror_place: str = ""

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def experiment_name(self) -> str:
        """The experiment in whose folder it is; empty for a run's folder elsewhere."""
        return self.folder.experiment_name

    @property
    def model_name(self) -> str:
        """The base: a folder's last part, or the id; empty where the config cannot be read."""
        name = str(self.config.get("model.id") or "")
        return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name

    @property
    def data_name(self) -> str:
        """The rows that it is trained on: the name of the first source, and how many there are besides."""
        sources = self.config.get("data.train") or []
        names = [Path(source).name for source in sources if isinstance(source, str)]
        if not names:
            return f"{len(sources)} rows" if sources else ""
        return names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"

    @property
    def learning_rate(self) -> float | None:
        """The peak learning rate; None where it was not settled yet."""
        rate = self.config.get("training.lr")
        return rate if _is_number(rate) else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the config."""
        return {
            "run": self.run_id,
            "experiment": self.experiment_name,
            "path": self.mirror_place or str(self.folder.root),
            "status": self.status,
            "detail": self.detail,
            "started": self.start_time.isoformat(timespec="seconds"),
            "tags": list(self.tags),
            "model": self.model_name,
            "data": self.data_name,
            "learning_rate": self.learning_rate,
            "metrics": self.metrics,
        }


def read_runs(base_output_dir: str, experiment_name: str | None = None) -> list[RunOverview]:
    """The runs of one experiment, or of all, the newest first. A broken one is among them and says why.

    Raises:
        ConfigurationError: there is no such experiment; names the nearest.
    """
    folders = find_run_folders(base_output_dir, experiment_name)
    return sorted(map(read_run, folders), key=lambda run: (run.start_time, run.run_id), reverse=True)


def find_runs(references: Sequence[str], base_output_dir: str) -> list[RunOverview]:
    """The runs that ids (of any experiment), paths, or `latest` (the newest, whatever became of it) mean; each once.

    Raises:
        CheckpointError: there is no such run, or the id is that of several.
    """
    found = [find_run(reference, base_output_dir) for reference in references]
    return [read_run(folder) for folder in {folder.root.resolve(): folder for folder in found}.values()]


def _hint(name: str, known: Sequence[str]) -> str:
    close = nearest_name(name, known)
    return f" Did you mean {close}?" if close else ""


def read_run(folder: RunFolder) -> RunOverview:
    """The run in a folder; whatever cannot be read of it is said in `detail`."""
    started = folder.start_time
    try:
        status = folder.status
        detail = f"died, {folder.process_label}" if folder.has_died else ""
        config = flatten_sections(
            _require_mapping(folder.read_metadata("config.json"), folder.metadata / "config.json")
        )
        metrics = (
            read_progress(folder)
            if status == "running" or folder.has_died
            else _finite_numbers(folder.read_metadata("summary.json"))
        )
    except (CheckpointError, OSError) as error:
        return RunOverview(folder, BROKEN, str(error), started)
    problems = [detail] if detail else []
    try:
        metrics = {**metrics, **_read_report_metrics(folder), **metrics}  # the summary first, and over all
        tags = read_tags(folder)
    except (CheckpointError, OSError) as error:
        tags = ()
        problems.append(str(error))
    return RunOverview(folder, status, " ".join(problems), started, tags, metrics, config)


def _require_mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected keys and values.")
    return value


def _read_report_metrics(folder: RunFolder) -> dict[str, float]:
    """The numbers of the run's reports; where two have the same one, that of the file that was written last."""
    there = [path for name in REPORTS if (path := folder.reports / name).is_file()]
    by_age = sorted(there, key=lambda path: path.stat().st_mtime_ns)
    numbers = [_finite_numbers(_require_mapping(read_checked_json(path), path)) for path in by_age]
    return {key: value for found in numbers for key, value in found.items() if key.startswith(MEASURED)}


def _finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in nested values, by dotted key."""
    return {key: value for key, value in flatten_sections(values).items() if _is_number(value)}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_logged_values(folder: RunFolder, kind: str, *keys: str) -> list[list[float]]:
    """What the lines of one kind in metrics.jsonl hold under some keys; lines without a finite number under each are
    left out.

    Args:
        kind: base, step or validation.
    """
    lines = read_metrics(folder.metrics_file) if folder.metrics_file.is_file() else []
    found = ([line.get(key) for key in keys] for line in lines if line.get("kind") == kind)
    return [[value for value in values if _is_number(value)] for values in found if all(map(_is_number, values))]


def read_progress(folder: RunFolder) -> dict[str, float]:
    """What metrics.jsonl tells of a run whose summary is not written yet, by the summary's names."""
    steps = read_logged_values(folder, "step", "step")
    told: dict[str, float] = {"steps": steps[-1][0] if steps else 0}
    told["seconds"] = sum(seconds for (seconds,) in read_logged_values(folder, "step", "seconds"))
    for kind, name in (("base", "base_validation_loss"), ("validation", "validation_loss")):
        if losses := [loss for (loss,) in read_logged_values(folder, kind, "loss")]:
            told[name] = min(losses)
    return told


def lower_is_better(metric: str) -> bool:
    """Whether the smaller value is the better one: losses, perplexity, seconds, bytes, errors, distances."""
    return any(part in metric for part in LOWER_IS_BETTER)


def sort_runs(runs: Sequence[RunOverview], metric: str, ascending: bool | None = None) -> list[RunOverview]:
    """The runs by a metric, the best first; those without it last, in the order given.

    Args:
        ascending: the smallest first; None: what `lower_is_better` says.

    Raises:
        ConfigurationError: no run has that metric; lists what there is.
    """
    known = sorted({name for run in runs for name in run.metrics})
    if metric not in known:
        there = f"they have {', '.join(known)}" if known else "they have none"
        raise ConfigurationError(
            f"metric '{metric}': none of the {len(runs)} runs has it; {there}.{_hint(metric, known)}"
        )
    sign = 1 if (lower_is_better(metric) if ascending is None else ascending) else -1
    return sorted(runs, key=lambda run: sign * run.metrics[metric] if metric in run.metrics else math.inf)


def best_run(runs: Sequence[RunOverview], metric: str, ascending: bool | None = None) -> RunOverview:
    """The finished run with the best value of a metric; arguments and errors are those of `sort_runs`."""
    return sort_runs([run for run in runs if run.status == "finished"], metric, ascending)[0]


def config_differences(runs: Sequence[RunOverview]) -> dict[str, tuple[Any, ...]]:
    """The settings on which the runs do not agree, with each one's value; the runs' ids apart."""
    found = find_differences([run.config for run in runs])
    return {key: values for key, values in found.items() if key not in NOT_COMPARED}


def have_same_validation(runs: Sequence[RunOverview]) -> bool:
    """Whether the runs were validated on the same rows, as far as their metadata/data.json tells it."""
    return len({rows for run in runs if (rows := _validation_rows(run)) is not None}) < 2


def _validation_rows(run: RunOverview) -> tuple[Any, ...] | None:
    """What decides the rows: the files' sha256; where they are held out of the training files, also share and seed."""
    try:
        data = run.folder.read_metadata("data.json")
        if "validation" in data:
            return tuple(sorted(data["validation"]["files"].values()))
        held_out = (run.config.get("data.val_ratio"), run.config.get("training.seed"))
        return (*sorted(data["train"]["files"].values()), *held_out) if held_out[0] else None
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
