"""The logs of a run as data frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_lens.runs.metrics_log import read_metrics

if TYPE_CHECKING:
    from pandas import DataFrame

STEP_COLUMNS = ("epoch", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "seconds", "finite")
NULLABLE_TYPES = {
    "tokens": "Int64",
    "supervised_tokens": "Int64",
    "finite": "boolean",
}  # kept in spite of empty cells
SAMPLE_COLUMNS = ("step", "base", "id", "prompt", "expected", "generated")


def metrics_frame(path: Path) -> DataFrame:
    """See `Run.metrics`.

    Args:
        path: a metrics.jsonl; the frame has no rows if it does not exist yet.
    """
    import pandas

    rows: dict[int, dict[str, Any]] = {}
    for line in _read_lines(path):
        rows.setdefault(line["step"], {}).update(_row_cells(line))
    validation = dict.fromkeys(name for row in rows.values() for name in row if name not in STEP_COLUMNS)
    index = pandas.Index(list(rows), name="step", dtype="int64")
    columns = {name: [row.get(name) for row in rows.values()] for name in (*STEP_COLUMNS, *validation)}
    kinds = {name: NULLABLE_TYPES.get(name, "float64") for name in columns}
    return pandas.DataFrame(columns, index=index).astype(kinds).sort_index()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.is_file() else []


def _row_cells(line: Mapping[str, Any]) -> dict[str, Any]:
    """The cells that a line adds to the row of its step."""
    if line.get("kind") == "step":
        return {name: line.get(name) for name in STEP_COLUMNS}
    if line.get("kind") not in ("base", "validation"):
        return {}
    parts = {**line.get("by_domain", {}), **line.get("by_file", {})}
    return {"validation_loss": line.get("loss"), **{f"validation_loss_{part}": loss for part, loss in parts.items()}}


def samples_frame(path: Path) -> DataFrame:
    """See `Run.samples`.

    Args:
        path: a samples.jsonl; the frame has no rows if it does not exist.
    """
    import pandas

    return pandas.DataFrame(list(_iterate_samples(_read_lines(path))), columns=list(SAMPLE_COLUMNS))


def _iterate_samples(lines: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for line in lines:
        for sample in line.get("samples", ()):
            yield {"step": line["step"], "base": line.get("base", False), **sample}
