"""Findings while the HF Trainer, or a trainer built on it, trains: from the captures of the lens in it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, get_args

from training_lens.analysis.findings.answer_findings import END_RULE, LOOP_RULE, PROMPT_RULE
from training_lens.analysis.findings.live_checks import CHECKS_IN_A_RUN, ActiveFindings, LiveRecording, check_captures
from training_lens.analysis.findings.loss_spike import BATCH_RULE, SPIKE_RULE
from training_lens.analysis.findings.nonfinite import RULE as NONFINITE
from training_lens.config.lens_section import FindingCode
from training_lens.core.framework import TrainingLensFramework
from training_lens.errors import ConfigurationError
from training_lens.runs.journal import Journal
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
FILE = "findings.jsonl"
LEAST_STEPS = 10  # between two checks
OURS_ALONE = {rule.code for rule in (SPIKE_RULE, BATCH_RULE, LOOP_RULE, END_RULE, PROMPT_RULE, NONFINITE)}
CODES = tuple(code for code in get_args(FindingCode) if code not in OURS_ALONE)


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
