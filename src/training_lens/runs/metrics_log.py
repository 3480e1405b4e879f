"""metrics.jsonl of a run: its lines, the values under a key, and a summary of a run that is not finished."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from training_lens.errors import CheckpointError
from training_lens.runs.journal import parse_line, warn_of_damaged_lines
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.limits import read_text
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, each with its `step`.

    An unreadable last line is skipped silently, since a kill may cut it. Other unreadable lines are skipped with a
    warning. A file that ends before `last_step` is reported, too.

    Args:
        last_step: a step that has a line in an undamaged file; by default the last one of a finished run.
    """
    texts = read_text(path).splitlines()
    lines = list(map(parse_line, texts))
    if None in lines[:-1]:
        warn_of_damaged_lines(path, tuple(number for number, line in enumerate(lines, 1) if line is None))
    found = [line for line in lines if line is not None]
    expected = _finished_step_count(path) if last_step is None else last_step
    _warn_of_missing_steps(path, max((line["step"] for line in found), default=0), expected)
    return found


@lru_cache(maxsize=64)
def _warn_of_missing_steps(path: Path, last_step: int, steps: int) -> None:
    if last_step < steps:
        logger.warning("%s is damaged: it ends at step %d of %d; the rest is missing", path, last_step, steps)


def _finished_step_count(metrics_file: Path) -> int:
    """The number of steps of the finished run that a metrics.jsonl belongs to; 0 if unfinished or unknown."""
    try:
        summary = RunFolder(metrics_file.parent.parent).read_metadata("summary.json")
        return int(summary["steps"]) if summary["status"] == "finished" else 0
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return 0


def is_finite_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_logged_values(folder: RunFolder, kind: str, *keys: str) -> list[list[float]]:
    """The values under `keys` of each base, step or validation line, without those that lack a finite number."""
    lines = read_metrics(folder.metrics_file) if folder.metrics_file.is_file() else []
    rows = ([line.get(key) for key in keys] for line in lines if line.get("kind") == kind)
    return [numbers for row in rows if len(numbers := [v for v in row if is_finite_number(v)]) == len(keys)]


def read_progress(folder: RunFolder) -> dict[str, float]:
    """The numbers of a summary that is not written yet, from metrics.jsonl, under the summary's keys."""
    steps = read_logged_values(folder, "step", "step")
    progress: dict[str, float] = {"steps": steps[-1][0] if steps else 0}
    progress["seconds"] = sum(seconds for (seconds,) in read_logged_values(folder, "step", "seconds"))
    for kind, name in (("base", "base_validation_loss"), ("validation", "validation_loss")):
        if losses := [loss for (loss,) in read_logged_values(folder, kind, "loss")]:
            progress[name] = min(losses)
    return progress
