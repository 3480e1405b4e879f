"""A run's journals in memory, kept up to date while it trains: read once, shared by all pages that show the run."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from training_lens.display.downsampling import thin_line
from training_lens.runs.journal import JournalReader, parse_line
from training_lens.runs.journal_table import LineTable
from training_lens.runs.metrics_log import is_finite_number
from training_lens.runs.run_folder import RunFolder

COLUMNS = ("step", "loss", "grad_norm", "lr", "seconds", "tokens", "epoch", "time")  # of steps
CURVES = ("loss", "grad_norm", "lr")
RECENT = 50  # steps over which speed and remaining time are measured
LINES_AT_ONCE = 2000  # of a journal
MOST_FEEDS = 8  # in memory: 6 MB for each 100,000 steps
SMOOTHED = 50  # steps; a shorter run has no running mean
VALIDATIONS = ("base", "validation", "validation_sample")


@dataclass
class RunFeed:
    """The lines of metrics.jsonl, samples.jsonl and findings.jsonl of one run, up to the last `refresh`."""

    run: RunFolder
    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._metrics = JournalReader(self.run.metrics_file)
        self._others = [
            (JournalReader(self.run.samples_file), self.samples),
            (JournalReader(self.run.findings_file), self.findings),
        ]

    def refresh(self) -> RunFeed:
        """Read what was appended since the last call."""
        with self._lock:
            while self._read_metrics():
                pass
            for reader, lines in self._others:
                while entries := reader.read(LINES_AT_ONCE):
                    lines.extend(dict(entry.values) for entry in entries)
        return self

    def _read_metrics(self) -> bool:
        """Read some of metrics.jsonl: many lines at once where it has them. False where nothing is left."""
        if (table := self._metrics.read_table(COLUMNS)) is not None:
            self._add_table(table)
            return True
        entries = self._metrics.read(LINES_AT_ONCE)
        self._add_metrics([entry.values for entry in entries])
        return bool(entries)

    def _add_table(self, table: LineTable) -> None:
        steps = table.choose_lines(table.kinds == "step")
        for name, column in self.columns.items():
            column.frombytes(steps.columns[name].tobytes())
        texts = table.texts[np.isin(table.kinds.astype(str), VALIDATIONS)]
        self.validations.extend(values for text in texts if (values := parse_line(text)) is not None)

    def _add_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        steps = [line for line in lines if line.get("kind") == "step"]
        for name, column in self.columns.items():
            column.extend(_as_floats([line.get(name) for line in steps]))
        self.validations.extend(dict(line) for line in lines if line.get("kind") in VALIDATIONS)

    def read_columns(self, *names: str) -> list[np.ndarray]:
        """Copies of columns of one length, (steps,) each: an array that is looked at cannot grow meanwhile."""
        with self._lock:
            return [np.array(self.columns[name]) for name in names]

    @property
    def last_step(self) -> int:
        steps = self.columns["step"]
        return int(steps[-1]) if steps else 0

    def steps_after(self, step: int) -> dict[str, list[float]]:
        """The columns of the steps after `step`."""
        with self._lock:
            start = bisect_right(self.columns["step"], step)
            return {name: column[start:].tolist() for name, column in self.columns.items()}

    def thin_curves(self, most: int, first: int = 0, last: int | None = None) -> dict[str, list[list[float]]]:
        """Each curve between two steps as [steps, values] of at most `most` points, with its minima and maxima."""
        steps, *columns = self.read_columns("step", *CURVES)
        chosen = slice(*np.searchsorted(steps, [first, math.inf if last is None else last + 1]).tolist())
        curves = {name: column[chosen] for name, column in zip(CURVES, columns, strict=True)}
        curves["loss_mean"] = average_neighbors(curves["loss"])
        found = {name: thin_line(steps[chosen], values, most) for name, values in curves.items() if len(values)}
        return {name: [at.tolist(), values.tolist()] for name, (at, values) in found.items()}

    def measure_speed(self, since: float = 0.0) -> dict[str, float]:
        """Tokens a second and seconds a step over the last steps; `step_seconds` includes validations between them.

        `since` is when the process that trains began: the time between a stop and a resume is not training.
        """
        tokens, seconds, times = (column[-RECENT:] for column in self.read_columns("tokens", "seconds", "time"))
        if not len(times):
            return {}
        speed = {"tokens_per_second": float(np.nansum(tokens) / max(np.nansum(seconds), 1e-9))}
        times = times[times >= since]
        if len(times) > 1:
            speed["step_seconds"] = float((times[-1] - times[0]) / (len(times) - 1))
        return speed


def _as_floats(values: Sequence[Any]) -> array[float]:
    """The numbers; NaN for what is none. A column at a time: a log of 100,000 steps has a million values."""
    try:
        return array("d", values)
    except (TypeError, OverflowError):
        return array("d", [float(value) if is_finite_number(value) else math.nan for value in values])


def average_neighbors(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each one: a fiftieth of the run, at least 5. Empty for a short run.

    Values that are not finite are left out; a place with none in reach is NaN. `values` is (steps,).
    """
    if len(values) < SMOOTHED:
        return values[:0]
    reach = max(5, len(values) // 50) // 2
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    ends = np.arange(len(values))
    low, high = np.maximum(ends - reach, 0), np.minimum(ends + reach + 1, len(values))
    count = counts[high] - counts[low]
    mean = np.full(len(values), np.nan)
    np.divide(sums[high] - sums[low], count, out=mean, where=count > 0)
    return mean


class FeedCache:
    """The feeds of the runs that pages show, the least recently used of which is dropped."""

    def __init__(self) -> None:
        self._feeds: OrderedDict[str, RunFeed] = OrderedDict()
        self._lock = Lock()

    def open_feed(self, run: RunFolder) -> RunFeed:
        """The feed of a run, up to date."""
        key = str(run.root)
        with self._lock:
            feed = self._feeds.setdefault(key, RunFeed(run))
            self._feeds.move_to_end(key)
            while len(self._feeds) > MOST_FEEDS:
                self._feeds.popitem(last=False)
        return feed.refresh()


def list_active_findings(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The findings that have arisen and not cleared, in the order in which they arose."""
    active: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        code = str(line.get("code"))
        active.pop(code, None)
        if line.get("event") == "raised":
            active[code] = line
    return list(active.values())
