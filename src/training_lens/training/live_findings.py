"""Findings while a run trains: shown once when they arise and once when they clear, and they may stop the run.

Each is that of the analysis after the run, asked of the captures so far; a loss spike and the sampled answers are
watched besides. They read only what the loop and the lens hold already, and change nothing that training reads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from training_lens.analysis.findings.answer_findings import END_RULE, LOOP_RULE, PROMPT_RULE, check_answers
from training_lens.analysis.findings.batch_size import check_batch_size
from training_lens.analysis.findings.convergence import check_convergence
from training_lens.analysis.findings.evidence import median_over_modules
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.findings.forgetting import check_forgetting
from training_lens.analysis.findings.layer_findings import check_layers
from training_lens.analysis.findings.loss_spike import BATCH_RULE, SPIKE_RULE, LossSpike, SpikeDetector, report_spike
from training_lens.analysis.findings.memorization import check_memorization
from training_lens.analysis.findings.nonfinite import check_nonfinite
from training_lens.analysis.findings.rate_high import check_rate_high
from training_lens.analysis.findings.rate_low import check_rate_low
from training_lens.analysis.findings.self_check import check_gradients
from training_lens.analysis.findings.untrained import check_untrained
from training_lens.core import table_names as tables
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.recording import Recording
from training_lens.core.running_captures import RunningCaptures
from training_lens.core.types import Series
from training_lens.evaluation.evaluator import LossReport
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import JournalCallback, StepReport
from training_lens.training.spike_rows import measure_spike_rows, name_spike_rows
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
CHECKS_IN_A_RUN = 20  # at most: each reads the captures so far
MOST_ROW_PASSES = 5  # spikes of which the rows are measured: a forward pass over the step's rows each
LATE = 0.5  # of the run: before it, good runs show some symptoms as well
# check -> the share of the run after which it runs
CHECKS: Mapping[Callable[[Recording], Finding], float] = {
    check_untrained: 0.0,
    check_gradients: 0.0,
    check_rate_high: 0.0,
    check_layers: 0.0,
    check_batch_size: LATE / 2,
    check_rate_low: LATE,
    check_memorization: 0.0,
    check_forgetting: 0.0,
    check_convergence: LATE,
}
NOTES = ("batch_large", "memorization", "forgetting")  # shown as notes, too, where they are not inconclusive
SPIKES = (SPIKE_RULE.code, BATCH_RULE.code)


class LiveFindings(JournalCallback):
    """Writes logs/findings.jsonl, logs a line when a finding arises or clears, and tells the callbacks.

    A line is `{"step", "event": "raised" or "cleared", "code", "severity", "title", "measured", "action", ...}`. A
    check that fails is logged, and the run goes on without live findings.

    Args:
        run: its captures are read, and its journals when it resumes.
        lens: writes the captures.
        stop_on: the codes of findings that stop the run.
    """

    def __init__(self, run: RunFolder, lens: TrainingLensFramework, stop_on: Collection[str] = ()) -> None:
        super().__init__(run.findings_file)
        self._run, self._lens, self._stop_on = run, lens, frozenset(stop_on)
        self._active: dict[str, str] = {}  # code -> title
        self._spikes, self._row_passes = SpikeDetector(), 0
        self._base_answers: Sequence[Mapping[str, Any]] = ()
        self._captures: RunningCaptures | None = None
        self._is_off = False
        self.seconds = 0.0

    def on_train_start(self, trainer: Any) -> None:
        super().on_train_start(trainer)
        with self._guard():
            self._restore_history(trainer.state.step)

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        with self._guard():
            spike = self._spikes.observe(report.step, report.loss, report.grad_norm)
            is_active = bool(self._active.keys() & set(SPIKES))
            if spike and not is_active and (finding := self._explain_spike(trainer, spike)):
                self._compare_findings(trainer, report.step, (), [finding])
            elif is_active and not spike:
                self._compare_findings(trainer, report.step, SPIKES, ())

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        if not base:
            self._check_captures(trainer, step)

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        self._check_captures(trainer, step)

    def on_samples(self, trainer: Any, step: int, answers: Sequence[Mapping[str, Any]], base: bool) -> None:
        with self._guard():
            if base:
                self._base_answers = answers
                return
            if step >= LATE * trainer.schedule.total_steps:
                codes = [rule.code for rule in (LOOP_RULE, END_RULE, PROMPT_RULE)]
                self._compare_findings(trainer, step, codes, check_answers(answers, self._base_answers))

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        with self._guard():
            finding = check_nonfinite(self._open_recording())
            if finding.severity == "problem":
                self._compare_findings(trainer, trainer.state.step + 1, (finding.code,), [finding])
        super().on_exception(trainer, error)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Time a block; a failure in it switches the live findings off."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if not self._is_off:
                logger.warning("the lens shows no more findings of this run: %s", describe_error(error))
                logger.debug("in the live findings", exc_info=True)
            self._is_off = True
        finally:
            self.seconds += time.perf_counter() - started

    def _restore_history(self, step: int) -> None:
        """After a resume: the losses before, the findings that are active, and the base's answers."""
        if not step:
            return
        for line in read_metrics(self._run.metrics_file, step):
            if line.get("kind") == "step" and line["step"] <= step:
                loss, norm = (math.nan if line[key] is None else line[key] for key in ("loss", "grad_norm"))
                self._spikes.observe(line["step"], loss, norm)
        for line in read_metrics(self.path, 0):
            if line["event"] == "raised":
                self._active[line["code"]] = line["title"]
                self._row_passes += line["code"] in SPIKES
            else:
                self._active.pop(line["code"], None)
        if self._run.samples_file.is_file():
            lines = [line for line in read_metrics(self._run.samples_file, 0) if line.get("base")]
            self._base_answers = lines[0]["samples"] if lines else ()

    def _open_recording(self) -> Recording:
        if self._captures is None:
            self._captures = self._lens.open_captures()
        else:
            self._captures.refresh()
        return Recording(self._run.run_id, self._run.root, self._captures.manifest, self._captures, "running")

    def _check_captures(self, trainer: Any, step: int) -> None:
        total = trainer.schedule.total_steps
        if self._is_off or not is_check_due(trainer, step):
            return
        with self._guard():
            recording = self._open_recording()
            findings = [check(recording) for check, after in CHECKS.items() if step >= after * total]
            if any(finding.severity == "problem" for finding in findings):  # notes on a broken run share its cause
                findings = [finding for finding in findings if finding.severity != "note"]
            self._compare_findings(trainer, step, [f.code for f in findings], list(filter(is_shown_live, findings)))

    def _explain_spike(self, trainer: Any, spike: LossSpike) -> Finding | None:
        recording = self._open_recording()
        a, b = (recording.series(tables.OPTIMIZER, f"update_rms_{of}") for of in "ab")
        rms = median_over_modules(Series(a.steps, a.names, np.fmax(a.values, b.values)) if a.names == b.names else b)
        is_exact = bool((np.diff(rms[0][rms[0] > spike.step - 10]) == 1).all()) and len(rms[0]) > 0
        if trainer.processes.count == 1 and self._row_passes < MOST_ROW_PASSES:
            self._row_passes += 1
            rows = measure_spike_rows(trainer, spike.step)
        else:
            rows = name_spike_rows(trainer, spike.step)
        return report_spike(spike, rows, rms, is_exact)

    def _compare_findings(self, trainer: Any, step: int, codes: Collection[str], found: Sequence[Finding]) -> None:
        """Show those of `found` that are new, and those of the codes that were looked for and are gone."""
        now = {finding.code: finding for finding in found}
        for code in [code for code in codes if code in self._active and code not in now]:
            title = self._active.pop(code)
            self._journal.write({"step": step, "event": "cleared", "code": code, "title": title})
            logger.info("step %d: no longer: %s [%s]", step, title, code)
        for code, finding in now.items():
            if code not in self._active:
                self._active[code] = finding.title
                self._show(trainer, step, finding)

    def _show(self, trainer: Any, step: int, finding: Finding) -> None:
        values = {name: value for name, value in asdict(finding).items() if name != "evidence"}
        rows = {name: finding.evidence[name] for name in ("rows", "modules") if name in finding.evidence}
        self._journal.write({"step": step, "event": "raised", **values, **rows})
        advice = finding.action or finding.decide
        logger.warning(
            "step %d: %s [%s]: %s. What to do: %s", step, finding.title, finding.code, finding.measured, advice
        )
        trainer.notify_callbacks("on_finding", finding)
        if finding.code in self._stop_on:
            trainer.request_stop(finding.code)


def is_check_due(trainer: Any, step: int) -> bool:
    """Whether the validation after this step is the first one in its twentieth of the run, or the last one."""
    width = max(1, trainer.schedule.total_steps // CHECKS_IN_A_RUN)
    earlier = range(max(1, step - step % width), step)
    is_first = not any(trainer.is_validation_due(other) or trainer.is_sample_due(other) for other in earlier)
    return is_first or step == trainer.schedule.total_steps


def is_shown_live(finding: Finding) -> bool:
    """Whether a finding is worth a line while the run trains: symptoms, and that it has converged."""
    if finding.severity in ("problem", "warning"):
        return True
    is_known = finding.severity == "note" and finding.confidence != "inconclusive"
    return is_known and (finding.code in NOTES or finding.title == "Converged")
