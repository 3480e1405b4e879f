"""Findings of a run that trains: the checks of its captures so far, and which of them have arisen and cleared.

Trainers built on the HF Trainer show them by a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, get_args

from training_lens.analysis.advice import translate_finding
from training_lens.analysis.findings.answer_findings import END_RULE, LOOP_RULE, PROMPT_RULE
from training_lens.analysis.findings.batch_size import check_batch_size
from training_lens.analysis.findings.convergence import check_convergence
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.findings.forgetting import check_forgetting
from training_lens.analysis.findings.layer_findings import check_layers
from training_lens.analysis.findings.loss_spike import BATCH_RULE, SPIKE_RULE
from training_lens.analysis.findings.memorization import check_memorization
from training_lens.analysis.findings.nonfinite import RULE as NONFINITE
from training_lens.analysis.findings.rank import SATURATED, check_rank
from training_lens.analysis.findings.rate_high import check_rate_high
from training_lens.analysis.findings.rate_low import check_rate_low
from training_lens.analysis.findings.self_check import check_gradients
from training_lens.analysis.findings.untrained import check_untrained
from training_lens.config.lens_section import FindingCode
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.lens_store import RunningCaptures
from training_lens.core.recording import Recording
from training_lens.errors import ConfigurationError
from training_lens.runs.journal import Journal
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
CHECKS_IN_A_RUN = 20  # at most: each reads the captures so far
LATE = 0.5  # of the run: before it, good runs show some symptoms as well
# check -> the share of the run after which it runs
CHECKS: Mapping[Callable[[Recording], Finding], float] = {
    check_untrained: 0.0,
    check_gradients: 0.0,
    check_rate_high: 0.0,
    check_layers: 0.0,
    check_batch_size: LATE / 2,
    check_rate_low: LATE,
    check_rank: LATE,
    check_memorization: 0.0,
    check_forgetting: 0.0,
    check_convergence: LATE,
}
NOTES = ("batch_large", "memorization", "forgetting")  # shown as notes, too, where they are not inconclusive
FILE = "findings.jsonl"
LEAST_STEPS = 10  # between two checks
OURS_ALONE = {rule.code for rule in (SPIKE_RULE, BATCH_RULE, LOOP_RULE, END_RULE, PROMPT_RULE, NONFINITE)}
CODES = tuple(code for code in get_args(FindingCode) if code not in OURS_ALONE)


def check_captures(recording: Recording, share: float) -> tuple[list[str], list[Finding]]:
    """The codes of the checks that were made, and the findings that are worth a line while the run trains.

    Args:
        share: of the run that is over, 0 to 1.
    """
    findings = [check(recording) for check, after in CHECKS.items() if share >= after]
    codes = [finding.code for finding in findings]
    if any(finding.severity == "problem" for finding in findings):  # notes on a broken run share its cause
        findings = [finding for finding in findings if finding.severity != "note"]
    return codes, [translate_finding(each, recording.manifest.origin) for each in findings if is_shown_live(each)]


def is_shown_live(finding: Finding) -> bool:
    """Whether a finding is worth a line while the run trains: symptoms, and that it has converged."""
    if finding.severity in ("problem", "warning"):
        return True
    if finding.severity != "note":
        return False
    is_known = finding.confidence != "inconclusive"
    return finding.title == SATURATED or (is_known and (finding.code in NOTES or finding.title == "Converged"))


class LiveRecording:
    """The recording of a run that trains, up to its newest captures.

    Args:
        lens: writes the captures.
        run_id, folder: those of the recording.
    """

    def __init__(self, lens: TrainingLensFramework, run_id: str, folder: Path) -> None:
        self._lens, self._run_id, self._folder = lens, run_id, folder
        self._captures: RunningCaptures | None = None

    def refresh(self) -> Recording:
        """The recording with what was captured since the last call."""
        if self._captures is None:
            self._captures = self._lens.open_captures()
        else:
            self._captures.refresh()
        return Recording(self._run_id, self._folder, self._captures.manifest, self._captures, "running")


class ActiveFindings:
    """The findings that have arisen and not cleared; logs and writes each once when it arises and when it clears.

    A line is `{"step", "event": "raised" or "cleared", "code", "severity", "title", "measured", "action", ...}`.

    Args:
        write: takes a line, such as `Journal.write`.
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._write = write
        self._titles: dict[str, str] = {}  # by code

    @property
    def codes(self) -> Collection[str]:
        return self._titles.keys()

    def restore(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Those that are active after these lines, in the order in which they were written."""
        for line in lines:
            if line["event"] == "raised":
                self._titles[line["code"]] = line["title"]
            else:
                self._titles.pop(line["code"], None)

    def update(self, step: int, codes: Collection[str], found: Sequence[Finding]) -> list[Finding]:
        """Show those of `found` that are new, which are returned, and those of the codes that are gone."""
        now = {finding.code: finding for finding in found}
        for code in [code for code in codes if code in self._titles and code not in now]:
            title = self._titles.pop(code)
            self._write({"step": step, "event": "cleared", "code": code, "title": title})
            logger.info("step %d: no longer: %s [%s]", step, title, code)
        new = [finding for code, finding in now.items() if code not in self._titles]
        for finding in new:
            self._titles[finding.code] = finding.title
            self._show(step, finding)
        return new

    def _show(self, step: int, finding: Finding) -> None:
        values = {name: value for name, value in asdict(finding).items() if name != "evidence"}
        rows = {name: finding.evidence[name] for name in ("rows", "modules") if name in finding.evidence}
        self._write({"step": step, "event": "raised", **values, **rows})
        advice = finding.action or finding.decide
        logger.warning(
            "step %d: %s [%s]: %s. What to do: %s", step, finding.title, finding.code, finding.measured, advice
        )


class TrainerEvents(Protocol):
    """What the callback reads of the Trainer's state."""

    global_step: int
    max_steps: int
    is_world_process_zero: bool


def build_findings_callback(lens: TrainingLensFramework, stop_on: Collection[str] = ()) -> Any:
    """A callback for the HF Trainer that shows findings while it trains; give it after `lens.trainer_callback()`.

    A finding is logged once when it arises and once when it clears, and written to `findings.jsonl` in the lens's
    folder. At most 20 times in a run, and at the end, the captures so far are checked, as `analyze` would check them.
    What needs the rows of a step or sampled answers (spikes of the loss, answers that repeat themselves) is not among
    them. A check that fails is logged, and training goes on.

    Args:
        stop_on: codes of findings that stop the training when they arise.

    Raises:
        ConfigurationError: a code is none of these findings.

    Example:
        callbacks=[lens.trainer_callback(), build_findings_callback(lens, stop_on=["rate_high"])]
    """
    from transformers import TrainerCallback

    if wrong := [code for code in stop_on if code not in CODES]:
        raise ConfigurationError(
            f"stop_on: '{wrong[0]}' is none of the findings of other trainers: {', '.join(CODES)}."
        )

    class TrainerFindings(TrainerCallback):
        """Checks the captures while a run trains; of several processes, the first does."""

        watch: _CaptureWatch | None = None

        def on_train_begin(self, args: Any, state: TrainerEvents, control: Any, **event: Any) -> None:
            self.watch = _CaptureWatch(lens, state.global_step) if state.is_world_process_zero else None

        def on_step_end(self, args: Any, state: TrainerEvents, control: Any, **event: Any) -> None:
            every = max(LEAST_STEPS, -(-state.max_steps // CHECKS_IN_A_RUN))
            if self.watch and state.global_step % every == 0:
                found = self.watch.check(state.global_step, state.global_step / state.max_steps)
                control.should_training_stop |= not found.isdisjoint(stop_on)

        def on_train_end(self, args: Any, state: TrainerEvents, control: Any, **event: Any) -> None:
            if self.watch:
                self.watch.check(state.global_step, state.global_step / state.max_steps)
                self.watch.close()
                self.watch = None

    return TrainerFindings()


class _CaptureWatch:
    """The findings of one training, from the captures of its lens."""

    def __init__(self, lens: TrainingLensFramework, after_step: int) -> None:
        self._recording, self._journal = LiveRecording(lens, lens.folder.name, lens.folder), Journal(lens.folder / FILE)
        self._active = ActiveFindings(self._journal.write)
        self._is_off = False
        try:
            lens.folder.mkdir(parents=True, exist_ok=True)
            self._journal.open(after=after_step)
            if after_step:
                self._active.restore(read_metrics(self._journal.path, 0))
        except Exception as error:
            self._switch_off(error)

    def check(self, step: int, share: float) -> set[str]:
        """The codes of findings that arise at this step."""
        if self._is_off:
            return set()
        try:
            codes, found = check_captures(self._recording.refresh(), share)
            return {finding.code for finding in self._active.update(step, codes, found)}
        except Exception as error:
            self._switch_off(error)
            return set()

    def close(self) -> None:
        self._journal.close()

    def _switch_off(self, error: Exception) -> None:
        self._is_off = True
        logger.warning("the lens shows no more findings of this run: %s", describe_error(error))
        logger.debug("in the live findings", exc_info=True)
