"""What a run is doing now, read from its folder, without torch: for the terminal, and for logs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from training_lens.analysis.page.run_feed import RunFeed, list_active_findings
from training_lens.analysis.page.run_page import (
    arrange_samples,
    assess_feed,
    describe_headline,
    describe_progress,
    read_comparison_report,
    read_config,
)
from training_lens.display.terminal_chart import NO_POINTS, Points
from training_lens.errors import CheckpointError
from training_lens.evaluation.verdict import Verdict
from training_lens.runs.metrics_log import is_finite_number
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_listing import BROKEN, name_model

PREPARING, TRAINING, DELETED = "preparing", "training", "deleted"  # besides the statuses that a run writes
START_SECONDS = 5.0  # a new run writes that it runs, and locks its folder a moment later
TRIES, TRY_SECONDS = 5, 0.2  # of reading a summary that is just being written


@dataclass(frozen=True)
class Validation:
    """A validation loss, and the base's on the same rows. `rows` counts those of a sample; None: all of them."""

    step: int
    loss: float
    base: float | None
    rows: int | None
    time: float

    @property
    def change(self) -> float | None:
        return None if self.base is None else self.loss - self.base


@dataclass(frozen=True)
class RunState:
    """A run as it is now. Losses are nats per supervised token.

    `status` is preparing, training, deleted, or the status that the run ended with; `detail` explains it. `progress` is
    that of `describe_progress`. `events` are the lines of findings.jsonl, `findings` the active ones of them; None
    where the run looks for none. `verdict` and `headline` come at the end.
    """

    run_id: str
    experiment: str
    folder: str
    model: str
    status: str
    detail: str = ""
    progress: Mapping[str, Any] = field(default_factory=dict)
    curve: Points = NO_POINTS
    base: float | None = None
    validations: tuple[Validation, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    findings: tuple[Mapping[str, Any], ...] | None = None
    samples: tuple[Mapping[str, Any], ...] = ()
    verdict: Verdict | None = None
    headline: str = ""

    @property
    def is_over(self) -> bool:
        return self.status not in (PREPARING, TRAINING)

    def as_json(self) -> dict[str, Any]:
        """The values of `--json`."""
        last = next((each for each in reversed(self.validations) if each.rows is None), None)
        known = self.curve.finite.values
        speed = self.progress.get("tokens_per_second")
        return {
            "run": self.run_id,
            "experiment": self.experiment,
            "folder": self.folder,
            "status": self.status,
            "detail": self.detail,
            "step": self.progress.get("step", 0),
            "total_steps": self.progress.get("total_steps"),
            "remaining_seconds": None if self.is_over else self.progress.get("remaining_seconds"),
            "tokens_per_second": speed,
            "loss": float(known[-1]) if len(known) else None,
            "base_validation_loss": self.base,
            "validation_loss": last.loss if last else None,
            "validation_step": last.step if last else None,
            "findings": None if self.findings is None else [dict(finding) for finding in self.findings],
            "verdict": self.verdict.as_json() if self.verdict else None,
            "headline": self.headline,
        }


class RunReader:
    """Reads the state of one run again and again; each time only what was appended since."""

    def __init__(self, run: RunFolder) -> None:
        self._run, self._feed = run, RunFeed(run)
        self._config: dict[str, Any] = {}
        self._has_findings = False  # whether the run looks for them; remembered after it was deleted

    def read_state(self, *, with_verdict: bool = False) -> RunState:
        """The current state; with the verdict if the run is over, or `with_verdict`."""
        run, feed = self._run, self._feed
        status, detail = read_run_status(run)
        feed.refresh()  # after the status: what a run writes before it ends is then there
        if status == "running":
            status = TRAINING if feed.last_step else PREPARING
        self._config = self._config or read_config(run)
        self._has_findings |= run.findings_file.exists()
        base, validations = list_validations(feed.validations)
        state = RunState(
            run.run_id,
            run.experiment_name,
            str(run.root),
            name_model(self._config),
            status,
            detail,
            describe_progress(run, feed, self._config),
            Points(np.array(feed.columns["step"]), np.array(feed.columns["loss"])),
            base,
            validations,
            tuple(feed.findings),
            tuple(list_active_findings(feed.findings)) if self._has_findings else None,
            tuple(arrange_samples(feed.samples)),
        )
        return self._add_verdict(state) if with_verdict or state.is_over else state

    def _add_verdict(self, state: RunState) -> RunState:
        verdict = assess_feed(self._run, self._feed)
        report = read_comparison_report(self._run) if verdict.basis == "comparison" else {}
        return replace(state, verdict=verdict, headline=describe_headline(verdict, report, self._feed)["phrase"])


def read_run_status(run: RunFolder) -> tuple[str, str]:
    """The status of a run, or that it was deleted or cannot be read; and what happened to it."""
    problem = ""
    for _ in range(TRIES):
        try:
            if run.has_died and time.time() - (run.metadata / "summary.json").stat().st_mtime > START_SECONDS:
                return "interrupted", f"its process died ({run.process_label})"
            return str(run.read_metadata("summary.json").get("status", "unknown")), ""
        except (CheckpointError, OSError, AttributeError) as error:
            if not run.metadata.is_dir():
                return DELETED, ""
            problem = str(error)
            time.sleep(TRY_SECONDS)
    return BROKEN, problem


def list_validations(lines: Sequence[Mapping[str, Any]]) -> tuple[float | None, tuple[Validation, ...]]:
    """The base's loss on all validation rows, and the validations since, in order."""
    base = next((line for line in lines if line.get("kind") == "base"), {})
    on_all, on_sample = (base[key] if is_finite_number(base.get(key)) else None for key in ("loss", "sample_loss"))
    return on_all, tuple(
        _read_validation(line, on_sample if line["kind"] == "validation_sample" else on_all)
        for line in lines
        if line.get("kind") != "base" and is_finite_number(line.get("loss"))
    )


def _read_validation(line: Mapping[str, Any], base: float | None) -> Validation:
    rows = line.get("rows") if line["kind"] == "validation_sample" else None
    return Validation(line["step"], line["loss"], base, rows, float(line.get("time") or math.nan))
