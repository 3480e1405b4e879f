"""Runs as plain values: listed, sorted and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.runs.housekeeping import read_tags
from training_lens.runs.metrics_log import is_finite_number, read_progress
from training_lens.runs.run_folder import RunFolder, read_checked_json
from training_lens.runs.run_lookup import find_run, find_run_folders
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.nested import find_differences, flatten_sections

BROKEN = "broken"
REPORTS = ("compare.json", "evaluation.json")
MEASURED = (
    "base.",
    "adapter.",
    "delta.",
    "by_domain.",
    "by_leak.",
    "controls.",
    "forgetting.",
    "tasks.",
)  # of a report
LOWER_IS_BETTER = ("loss", "perplexity", "seconds", "bytes", "bits", "error", "distance", "_kl")
NOT_COMPARED = ("output.run_id",)


@dataclass(frozen=True)
class RunOverview:
    """One run, as read from its files.

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
        """The experiment that the folder belongs to; empty for a run folder elsewhere."""
        return self.folder.experiment_name

    @property
    def model_name(self) -> str:
        return name_model(self.config)

    @property
    def data_name(self) -> str:
        return name_data(self.config)

    @property
    def learning_rate(self) -> float | None:
        """The peak learning rate; None if it is not decided yet."""
        rate = self.config.get("training.lr")
        return rate if is_finite_number(rate) else None

    def as_json(self) -> dict[str, Any]:
        """JSON values, without the config."""
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


def name_model(config: Mapping[str, Any]) -> str:
    """The base model of a config by dotted key: a folder's name or a hub id; empty without one."""
    name = str(config.get("model.id") or "")
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def name_data(config: Mapping[str, Any]) -> str:
    """The training data of a config by dotted key: the name of the first source, and the number of others."""
    sources = config.get("data.train") or []
    names = [Path(source).name for source in sources if isinstance(source, str)]
    if not names:
        return f"{len(sources)} rows" if sources else ""
    return names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}"


def read_runs(base_output_dir: str, experiment_name: str | None = None) -> list[RunOverview]:
    """The runs of one experiment, or of all, newest first. Broken runs are included, with the reason in `detail`."""
    folders = find_run_folders(base_output_dir, experiment_name)
    return sorted(map(read_run, folders), key=lambda run: (run.start_time, run.run_id), reverse=True)


def find_runs(references: Sequence[str], base_output_dir: str) -> list[RunOverview]:
    """The runs that references mean, see `find_run`, without duplicates."""
    found = [find_run(reference, base_output_dir) for reference in references]
    return [read_run(folder) for folder in {folder.root.resolve(): folder for folder in found}.values()]


def read_run(folder: RunFolder) -> RunOverview:
    """The run in a folder; `detail` names what cannot be read."""
    started = folder.start_time
    try:
        status = folder.status
        detail = f"died, {folder.process_label}" if folder.has_died else ""
        path = folder.metadata / "config.json"
        config = flatten_sections(_require_mapping(folder.read_metadata(path.name), path))
        is_unwritten = status == "running" or folder.has_died
        metrics = read_progress(folder) if is_unwritten else _finite_numbers(folder.read_metadata("summary.json"))
    except (CheckpointError, OSError) as error:
        return RunOverview(folder, BROKEN, str(error), started)
    problems = [detail] if detail else []
    try:
        metrics = {**metrics, **_read_report_metrics(folder), **metrics}  # the summary comes first, and wins
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
    """The numbers in the run's reports; where two share a key, that of the later file."""
    paths = [path for name in REPORTS if (path := folder.reports / name).is_file()]
    by_age = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    numbers = [_finite_numbers(_require_mapping(read_checked_json(path), path)) for path in by_age]
    return {key: value for found in numbers for key, value in found.items() if key.startswith(MEASURED)}


def _finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in nested values, by dotted key."""
    return {key: value for key, value in flatten_sections(values).items() if is_finite_number(value)}


def lower_is_better(metric: str) -> bool:
    """Whether smaller is better: losses, perplexity, seconds, bytes, errors, distances."""
    return any(part in metric for part in LOWER_IS_BETTER)


def sort_runs(runs: Sequence[RunOverview], metric: str, ascending: bool | None = None) -> list[RunOverview]:
    """The runs sorted by a metric, best first; those without it last, in the order given. Refused if none has it.

    Args:
        ascending: smallest first; None: as `lower_is_better` decides.
    """
    known = sorted({name for run in runs for name in run.metrics})
    if metric not in known:
        there = f"they have {', '.join(known)}" if known else "they have none"
        raise ConfigurationError(
            f"metric '{metric}': none of the {len(runs)} runs has it; {there}.{did_you_mean(metric, known)}"
        )
    sign = 1 if (lower_is_better(metric) if ascending is None else ascending) else -1
    return sorted(runs, key=lambda run: sign * run.metrics[metric] if metric in run.metrics else math.inf)


def best_run(runs: Sequence[RunOverview], metric: str, ascending: bool | None = None) -> RunOverview:
    """The finished run with the best value of a metric; arguments and errors are those of `sort_runs`."""
    return sort_runs([run for run in runs if run.status == "finished"], metric, ascending)[0]


def config_differences(runs: Sequence[RunOverview]) -> dict[str, tuple[Any, ...]]:
    """The settings that differ between the runs, with each run's value; run ids are ignored."""
    found = find_differences([run.config for run in runs])
    return {key: values for key, values in found.items() if key not in NOT_COMPARED}


def have_same_validation(runs: Sequence[RunOverview]) -> bool:
    """Whether the runs were validated on the same rows, according to metadata/data.json."""
    return len({rows for run in runs if (rows := _validation_rows(run)) is not None}) < 2


def _validation_rows(run: RunOverview) -> tuple[Any, ...] | None:
    """What determines the validation rows: the sha256 of their files; for held-out rows also their share and seed."""
    try:
        data = run.folder.read_metadata("data.json")
        if "validation" in data:
            return tuple(sorted(data["validation"]["files"].values()))
        held_out = (run.config.get("data.val_ratio"), run.config.get("training.seed"))
        return (*sorted(data["train"]["files"].values()), *held_out) if held_out[0] else None
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
