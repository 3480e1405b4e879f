"""Losses from the log of a run: our metrics.jsonl, or the HF Trainer's trainer_state.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
LogRow = tuple[str, int, dict[str, float]]  # table, step, measures


@dataclass(frozen=True)
class Log:
    """The tables `loss` and `evaluation` of a log, and the `LensManifest.settings` that it contains.

    `status` is finished, or unknown.
    """

    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    status: str = "unknown"

    def series(self, table: str, measure: str) -> Series:
        """One measure over steps; empty if the log does not have it."""
        found = self.tables.get(table)
        return Series.empty() if found is None or measure not in found.column_names else extract_series(found, measure)


def read_our_log(metrics: Path, settings: Mapping[str, Any] | None = None) -> Log:
    """The log of one of our runs; empty without a metrics.jsonl.

    Args:
        settings: known `LensManifest.settings` of the run; they override those of the log.
    """
    lines = read_metrics(metrics) if metrics.is_file() else []
    return Log(_build_tables(_read_our_rows(lines)), {**_estimate_run_length(lines), **(settings or {})})


def _estimate_run_length(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The steps per epoch, from the last step."""
    last = next((line for line in reversed(lines) if line.get("kind") == "step" and line.get("epoch")), None)
    return {"steps_per_epoch": max(1, round(last["step"] / last["epoch"]))} if last else {}


def _read_our_rows(lines: Iterable[Mapping[str, Any]]) -> Iterator[LogRow]:
    for line in lines:
        if line.get("kind") == "step":
            yield (
                tables.LOSS,
                line["step"],
                _drop_missing({name: line.get(name) for name in tables.MEASURES[tables.LOSS]}),
            )
        elif line.get("kind") in ("validation", "base"):
            measure = "base_loss" if line["kind"] == "base" else "loss"
            yield tables.EVALUATION, line["step"], _drop_missing({measure: line.get("loss")})


def read_trainer_log(path: Path) -> Log:
    """The log in a trainer_state.json; its losses are means over the steps since the previous entry.

    Raises:
        LensError: it is not JSON, or not the state of a trainer.
    """
    try:
        state = read_json(path)
        steps, epochs = state["max_steps"], state["num_train_epochs"]
        rows = list(_read_trainer_rows(state["log_history"]))
        done = state["global_step"] >= steps > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LensError(
            f"{path} is damaged ({type(error).__name__}: {error}). Restore it, or move it away to read "
            "the adapters without losses."
        ) from error
    settings = {"total_steps": steps, "steps_per_epoch": max(1, round(steps / epochs)) if epochs else None}
    return Log(_build_tables(rows), settings, "finished" if done else "unknown")


def read_trainer_step(path: Path) -> int:
    """The step after which a trainer_state.json was written.

    Raises:
        LensError: it is damaged.
    """
    try:
        return int(read_json(path)["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LensError(f"{path} is damaged ({type(error).__name__}: {error}). Restore it, or move it away.") from error


def _read_trainer_rows(history: Iterable[Mapping[str, Any]]) -> Iterator[LogRow]:
    for entry in history:
        if "loss" in entry:
            given = {ours: entry.get(theirs) for theirs, ours in TRAINER_NAMES.items()}
            yield tables.LOSS, int(entry["step"]), _drop_missing(given)
        elif "eval_loss" in entry:
            yield tables.EVALUATION, int(entry["step"]), _drop_missing({"loss": entry["eval_loss"]})


def _drop_missing(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}


def _build_tables(rows: Iterable[LogRow]) -> dict[str, pa.Table]:
    """One table per name; of two rows for one step, as a resumed run logs them, the later one wins."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for table, step, values in rows:
        found.setdefault(table, {}).setdefault(step, {}).update(values)
    return {
        table: arrow_table([(s, Captured({m: torch.tensor([v]) for m, v in values.items()})) for s, values in steps])
        for table, by_step in found.items()
        if (steps := sorted(by_step.items()))
    }
