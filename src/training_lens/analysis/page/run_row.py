"""A run as a row of a list, read from its small files and from parts of its logs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_lens.analysis.page.run_feed import list_active_findings
from training_lens.errors import CheckpointError
from training_lens.evaluation.training_verdict import assess_training, build_training_record, read_comparison_verdict
from training_lens.evaluation.verdict import Verdict
from training_lens.runs.housekeeping import read_tags
from training_lens.runs.journal import parse_line
from training_lens.runs.metrics_log import is_finite_number
from training_lens.runs.run_folder import RunFolder, read_checked_json
from training_lens.runs.run_listing import BROKEN, name_data, name_model
from training_lens.utils.nested import flatten_sections

SPARK_POINTS = 32  # of a run's loss in the list
WHOLE_BYTES = 1 << 16  # a log up to this size is read whole for them, and this much of the end of a longer one


@dataclass(frozen=True)
class RunRow:
    """One run in the list. Losses are nats per supervised token; `started` is in seconds since 1970.

    `verdict` is its outcome, severity, sentence and basis; `findings` counts those that are active, by severity;
    `spark` are training losses at even distances. `steps` are done, of `total_steps` if that is known.
    """

    experiment: str
    run: str
    status: str
    started: float
    detail: str = ""
    tags: tuple[str, ...] = ()
    model: str = ""
    data: str = ""
    learning_rate: float | None = None
    rank: int | None = None
    steps: int = 0
    total_steps: int | None = None
    seconds: float = 0.0
    loss: float | None = None
    base_loss: float | None = None
    verdict: Mapping[str, str] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    spark: tuple[float, ...] = ()


def read_run_row(run: RunFolder) -> RunRow:
    """The row of a run; of one whose files cannot be read, with the reason. Recorded hashes are not checked here."""
    experiment, run_id = run.experiment_name, run.run_id
    try:
        summary, config = (read_checked_json(run.metadata / name) for name in ("summary.json", "config.json"))
        has_died = summary["status"] == "running" and run.has_died
        config = flatten_sections(config)
        lines = list(sample_log(run.metrics_file))
        progress = _read_progress(lines, summary)
        return RunRow(
            experiment,
            run_id,
            "interrupted" if has_died else str(summary["status"]),
            run.start_time.timestamp(),
            detail=f"Its process died ({run.process_label})." if has_died else "",
            tags=read_tags(run),
            **_describe_settings(config),
            **progress,
            total_steps=find_total_steps(config, lines),
            verdict=_describe_verdict(run, progress),
            findings=_count_findings(run),
            spark=_sample_losses(lines),
        )
    except (CheckpointError, OSError, TypeError, KeyError, AttributeError) as error:
        return RunRow(experiment, run_id, BROKEN, run.start_time.timestamp(), detail=str(error))


def _describe_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    rate, rank = config.get("training.lr"), config.get("peft.r")
    return {
        "model": name_model(config),
        "data": name_data(config),
        "learning_rate": rate if is_finite_number(rate) else None,
        "rank": rank if isinstance(rank, int) else None,
    }


def _read_progress(lines: list[dict[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Steps, seconds and losses: of the summary, and of the log where the run has not written it."""
    if summary.get("status") != "running":
        names = {"steps": "steps", "seconds": "seconds", "loss": "validation_loss", "base_loss": "base_validation_loss"}
        found = {name: summary.get(key) for name, key in names.items()}
        return {name: value for name, value in found.items() if is_finite_number(value)}
    steps = [line for line in lines if line.get("kind") == "step"]
    losses = {kind: _known_losses(lines, kind) for kind in ("base", "validation")}
    seconds = float(steps[-1]["time"]) - float(steps[0]["time"]) if steps and "time" in steps[0] else 0.0
    return {
        "steps": int(steps[-1]["step"]) if steps else 0,
        "seconds": seconds,
        "loss": min(losses["validation"], default=None),
        "base_loss": min(losses["base"], default=None),
    }


def _known_losses(lines: list[dict[str, Any]], kind: str) -> list[float]:
    return [line["loss"] for line in lines if line.get("kind") == kind and is_finite_number(line.get("loss"))]


def find_total_steps(config: Mapping[str, Any], lines: list[dict[str, Any]]) -> int | None:
    """The steps that a run will take by its config and the epochs that its log counts; None before the first step."""
    if isinstance(config.get("training.max_steps"), int):
        return int(config["training.max_steps"])
    steps = (line for line in reversed(lines) if line.get("kind") == "step")
    last = next((line for line in steps if is_finite_number(line.get("epoch")) and line["epoch"] > 0), None)
    epochs = config.get("training.epochs")
    if last is None or not is_finite_number(epochs):
        return None
    return max(int(last["step"]), round(float(last["step"] / last["epoch"] * epochs)))


def _describe_verdict(run: RunFolder, progress: Mapping[str, Any]) -> dict[str, str]:
    verdict = read_comparison_verdict(run) or assess_losses(progress.get("base_loss"), progress.get("loss"))
    parts = ("outcome", "severity", "sentence", "basis")
    return {part: str(getattr(verdict, part)) for part in parts}


def assess_losses(base: float | None, best: float | None) -> Verdict:
    """The verdict from the base's validation loss and the best one."""
    validated = [] if best is None else [(0.0, best)]
    return assess_training(build_training_record([], [], base, validated))


def _count_findings(run: RunFolder) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in list_active_findings(list(sample_log(run.findings_file))):
        severity = str(line.get("severity"))
        counts[severity] = counts.get(severity, 0) + 1
    return counts


def _sample_losses(lines: list[dict[str, Any]]) -> tuple[float, ...]:
    losses = _known_losses(lines, "step")
    if len(losses) <= SPARK_POINTS:
        return tuple(losses)
    return tuple(losses[i * (len(losses) - 1) // (SPARK_POINTS - 1)] for i in range(SPARK_POINTS))


def sample_log(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a journal in order: all of a short one; of a long one some at even distances, and all of its end."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > WHOLE_BYTES:
                for part in range(SPARK_POINTS):
                    file.seek((size - WHOLE_BYTES) * part // SPARK_POINTS)
                    if part:
                        file.readline()  # the rest of a line
                    yield from _parse_lines([file.readline()])
                file.seek(size - WHOLE_BYTES)
                file.readline()
            yield from _parse_lines(file.read(WHOLE_BYTES).splitlines())
    except FileNotFoundError:
        return


def _parse_lines(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    yield from (values for line in lines if (values := parse_line(line)) is not None)
