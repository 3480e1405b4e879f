"""Losses from the log of a run: our metrics.jsonl, or the HF Trainer's trainer_state.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from training_lens.core import table_names as tables
from training_lens.core.arrow import arrow_table, extract_series
from training_lens.core.types import Captured, Series
from training_lens.errors import LensError
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.files import read_json

TRAINER_STATE = "trainer_state.json"
TRAINER_NAMES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "epoch": "epoch"}
LogRow = tuple[str, int, dict[str, float | None]]  # table, step, measures


@dataclass(frozen=True)
class Log:
    """The tables `loss` and `evaluation` of a log, and the `LensManifest.settings` that it contains.

    `status` is finished, or unknown; `step` the last one of an HF Trainer's.
    """

    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    status: str = "unknown"
    step: int = 0

    def series(self, table: str, measure: str) -> Series:
        """One measure over steps; empty if the log does not have it."""
        found = self.tables.get(table)
        return Series.empty() if found is None or measure not in found.column_names else extract_series(found, measure)


def read_our_log(metrics: Path, settings: Mapping[str, Any] | None = None) -> Log:
    """The log of one of our runs; empty without a metrics.jsonl. Known `settings` override those of the log."""
    lines = read_metrics(metrics) if metrics.is_file() else []
    rows: list[LogRow] = []
    estimated: dict[str, Any] = {}
    for line in lines:
        if line.get("kind") == "step":
            rows.append((tables.LOSS, line["step"], {name: line.get(name) for name in tables.MEASURES[tables.LOSS]}))
            if line.get("epoch"):
                estimated["steps_per_epoch"] = max(1, round(line["step"] / line["epoch"]))
        elif line.get("kind") in ("validation", "base"):
            measure = "base_loss" if line["kind"] == "base" else "loss"
            values = {measure: line.get("loss"), "sample_loss": line.get("sample_loss")}
            rows.append((tables.EVALUATION, line["step"], values))
        elif line.get("kind") == "validation_sample":
            values = {"sample_loss": line.get("loss"), "sample_error": line.get("error")}
            rows.append((tables.EVALUATION, line["step"], values))
    return Log(_build_tables(rows), {**estimated, **(settings or {})})


def read_trainer_log(path: Path) -> Log:
    """The log in a trainer_state.json; its losses are means over the steps since the previous entry."""
    try:
        state = read_json(path)
        steps, epochs = state["max_steps"], state["num_train_epochs"]
        rows: list[LogRow] = []
        for entry in state["log_history"]:
            if "loss" in entry:
                given = {ours: entry.get(theirs) for theirs, ours in TRAINER_NAMES.items()}
                rows.append((tables.LOSS, int(entry["step"]), given))
            elif "eval_loss" in entry:
                rows.append((tables.EVALUATION, int(entry["step"]), {"loss": entry["eval_loss"]}))
        logged, step = _build_tables(rows), int(state["global_step"])
        done = step >= steps > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LensError(
            f"{path} is damaged ({type(error).__name__}: {error}). Restore it, or move it away to read "
            "the adapters without losses."
        ) from error
    settings = {"total_steps": steps, "steps_per_epoch": max(1, round(steps / epochs)) if epochs else None}
    return Log(logged, settings, "finished" if done else "unknown", step)


def _build_tables(rows: Iterable[LogRow]) -> dict[str, pa.Table]:
    """One table per name; of two rows for one step, as a resumed run logs them, the later one wins."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for table, step, values in rows:
        known = {name: float(value) for name, value in values.items() if value is not None}
        found.setdefault(table, {}).setdefault(step, {}).update(known)
    return {
        table: arrow_table([(s, Captured({m: torch.tensor([v]) for m, v in values.items()})) for s, values in steps])
        for table, by_step in found.items()
        if (steps := sorted(by_step.items()))
    }
