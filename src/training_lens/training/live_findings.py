"""Findings while a run trains: shown once when they arise and once when they clear, and they may stop the run.

Each is that of the analysis after the run, asked of the captures so far; a loss spike and the sampled answers are
watched besides. They read only what the loop and the lens hold already, and change nothing that training reads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from training_lens.analysis.findings.answer_findings import END_RULE, LOOP_RULE, PROMPT_RULE, check_answers
from training_lens.analysis.findings.evidence import median_over_modules
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.findings.live_checks import (
    CHECKS_IN_A_RUN,
    LATE,
    ActiveFindings,
    LiveRecording,
    check_captures,
)
from training_lens.analysis.findings.loss_spike import (
    BATCH_RULE,
    SPIKE_RULE,
    LossSpike,
    RowLoss,
    SpikeDetector,
    SpikeRows,
    report_spike,
)
from training_lens.analysis.findings.nonfinite import check_nonfinite
from training_lens.core import table_names as tables
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.types import Series
from training_lens.data.columns import mask_first_tokens
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import EvaluationOptions, LossReport, token_sums
from training_lens.models.adapters import base_only
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import JournalCallback, StepReport
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
MOST_ROW_PASSES = 5  # spikes of which the rows are measured: a forward pass over the step's rows each
SPIKES = (SPIKE_RULE.code, BATCH_RULE.code)
COMPARED = 16  # rows drawn at random, and rows that resemble the hardest one
SCANNED = 20_000  # rows among which those are looked for


class LiveFindings(JournalCallback):
    """Writes logs/findings.jsonl, logs a line when a finding arises or clears, and tells the callbacks.

    See `ActiveFindings` for its lines. A check that fails is logged, and the run goes on without live findings.

    Args:
        run: its captures are read, and its journals when it resumes.
        lens: writes the captures.
        stop_on: the codes of findings that stop the run.
    """

    def __init__(self, run: RunFolder, lens: TrainingLensFramework, stop_on: Collection[str] = ()) -> None:
        super().__init__(run.findings_file)
        self._run, self._stop_on = run, frozenset(stop_on)
        self._recording = LiveRecording(lens, run.run_id, run.root)
        self._active = ActiveFindings(self._journal.write)
        self._spikes, self._row_passes = SpikeDetector(), 0
        self._base_answers: Sequence[Mapping[str, Any]] = ()
        self._is_off = False
        self.seconds = 0.0

    def on_train_start(self, trainer: Any) -> None:
        super().on_train_start(trainer)
        with self._guard():
            self._restore_history(trainer.state.step)

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        with self._guard():
            spike = self._spikes.observe(report.step, report.loss, report.grad_norm)
            is_active = not set(SPIKES).isdisjoint(self._active.codes)
            if spike and not is_active and (finding := self._explain_spike(trainer, spike)):
                self._update(trainer, report.step, (), [finding])
            elif is_active and not spike:
                self._update(trainer, report.step, SPIKES, ())

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
                self._update(trainer, step, codes, check_answers(answers, self._base_answers))

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        with self._guard():
            finding = check_nonfinite(self._recording.refresh())
            if finding.severity == "problem":
                self._update(trainer, trainer.state.step + 1, (finding.code,), [finding])
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
        events = read_metrics(self.path, 0)
        self._active.restore(events)
        self._row_passes += sum(line["event"] == "raised" and line["code"] in SPIKES for line in events)
        if self._run.samples_file.is_file():
            lines = [line for line in read_metrics(self._run.samples_file, 0) if line.get("base")]
            self._base_answers = lines[0]["samples"] if lines else ()

    def _check_captures(self, trainer: Any, step: int) -> None:
        if self._is_off or not is_check_due(trainer, step):
            return
        with self._guard():
            self._update(trainer, step, *check_captures(self._recording.refresh(), step / trainer.schedule.total_steps))

    def _explain_spike(self, trainer: Any, spike: LossSpike) -> Finding | None:
        recording = self._recording.refresh()
        a, b = (recording.series(tables.OPTIMIZER, f"update_rms_{of}") for of in "ab")
        rms = median_over_modules(Series(a.steps, a.names, np.fmax(a.values, b.values)) if a.names == b.names else b)
        is_exact = bool((np.diff(rms[0][rms[0] > spike.step - 10]) == 1).all()) and len(rms[0]) > 0
        if trainer.processes.count == 1 and self._row_passes < MOST_ROW_PASSES:
            self._row_passes += 1
            rows = measure_spike_rows(trainer, spike.step)
        else:
            rows = name_spike_rows(trainer, spike.step)
        return report_spike(spike, rows, rms, is_exact)

    def _update(self, trainer: Any, step: int, codes: Collection[str], found: Sequence[Finding]) -> None:
        for finding in self._active.update(step, codes, found):
            trainer.notify_callbacks("on_finding", finding)
            if finding.code in self._stop_on:
                trainer.request_stop(finding.code)


def is_check_due(trainer: Any, step: int) -> bool:
    """Whether the validation after this step is the first one in its twentieth of the run, or the last one."""
    width = max(1, trainer.schedule.total_steps // CHECKS_IN_A_RUN)
    earlier = range(max(1, step - step % width), step)
    is_first = not any(trainer.is_validation_due(other) or trainer.is_sample_due(other) for other in earlier)
    return is_first or step == trainer.schedule.total_steps


def measure_spike_rows(trainer: Any, step: int) -> SpikeRows:
    """The losses of the step's rows now and in the base, and the base's on other rows. Changes nothing.

    Cost: a forward pass over the step's rows, one of the base over them and 32 others, and a pass over the tokens of
    at most 20,000 rows.
    """
    dataset, positions = trainer.dataset, _list_rows(trainer, step)
    now, base = _measure_losses(trainer, positions, False), _measure_losses(trainer, positions, True)
    rows = [
        RowLoss(dataset.example_id(int(i)), *pair)
        for i, *pair in zip(positions, now.tolist(), base.tolist(), strict=True)
    ]
    others = np.setdiff1d(np.arange(len(dataset)), positions)
    drawn = np.random.Generator(np.random.PCG64(step)).permutation(others)[:SCANNED]
    usual = np.sort(drawn[:COMPARED])
    similar = find_similar_rows(dataset, int(positions[np.argmax(base)]), np.sort(drawn), COMPARED)
    return SpikeRows(rows, _measure_losses(trainer, usual, True), _measure_losses(trainer, similar, True))


def name_spike_rows(trainer: Any, step: int) -> SpikeRows:
    """The step's rows without a loss: of several processes, each would have to take part in measuring."""
    rows = [RowLoss(trainer.dataset.example_id(int(i)), np.nan, np.nan) for i in _list_rows(trainer, step)]
    return SpikeRows(rows, np.zeros(0), np.zeros(0))


def _list_rows(trainer: Any, step: int) -> np.ndarray:
    return np.asarray(next(trainer.schedule.iterate_steps(after=step - 1)).examples)


def _measure_losses(trainer: Any, positions: np.ndarray, base: bool) -> np.ndarray:
    """The loss of each row per supervised token, of the base or the adapter; (rows,) float64."""
    if not len(positions):
        return np.zeros(0)
    options = EvaluationOptions(trainer.processes, trainer.precision, trainer.micro_batch_tokens, trainer.pad_id)
    with base_only(trainer.model, base):
        sums = token_sums(trainer.model, trainer.dataset.select(positions), options)
    losses: np.ndarray = sums.nll / sums.tokens
    return losses


def find_similar_rows(dataset: TokenDataset, position: int, among: np.ndarray, count: int) -> np.ndarray:
    """The rows `among` whose targets have the most in common with those of a row, ascending.

    By the share of their targets that the row has as well, each token weighted by its surprisal under the counts of
    all: rare tokens tell a language or a domain, common ones do not.
    """
    example = dataset[position]
    chosen = dataset.select(among)
    vocabulary = max(int(c.input_ids.max(initial=0)) for _, c in dataset.iterate_columns()) + 1
    counts = np.ones(vocabulary)
    for _, chunk in chosen.iterate_columns():
        counts += np.bincount(chunk.input_ids, minlength=vocabulary)
    weights = -np.log(counts / counts.sum())
    shared = np.where(np.isin(np.arange(vocabulary), example.input_ids[example.loss_mask]), weights, 0.0)
    shares = np.zeros(len(chosen))
    for positions, chunk in chosen.iterate_columns():
        taught = mask_first_tokens(chunk.response, chunk.offsets)
        rows = np.repeat(np.arange(len(chunk)), chunk.lengths)[taught]
        tokens = chunk.input_ids[taught]
        found = np.bincount(rows, shared[tokens], minlength=len(chunk))
        shares[positions] = found / np.maximum(np.bincount(rows, weights[tokens], minlength=len(chunk)), 1e-9)
    return np.sort(among[np.argsort(-shares, kind="stable")[:count]])
