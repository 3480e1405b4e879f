"""Answers that do not depend on their prompts: labels of other rows, or a run too short to read them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analyzers.module_groups import finite_points
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.evaluation.comparison_verdict import HARDLY_READ
from training_lens.evaluation.training_verdict import read_comparison_verdict
from training_lens.measures.curves import NORMAL_95
from training_lens.runs.run_folder import RunFolder


class SwapGain(NamedTuple):
    """By how many nats per token the right prompts lower the loss, and the standard error of that; NaN if unknown."""

    gain: float
    error: float

    @classmethod
    def from_recording(cls, recording: Recording, of: str) -> SwapGain:
        """`of` is `swap` for held-out rows, `base_swap` for these in the base, or `train_swap` for training rows."""
        found = [finite_points(recording, tables.EVALUATION, f"{of}_{name}")[1] for name in ("gain", "error")]
        return cls(*(float(values[-1]) if len(values) else np.nan for values in found))

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.gain - NORMAL_95 * self.error, self.gain + NORMAL_95 * self.error

    def __str__(self) -> str:
        return "{:+.3g} ({:+.3g} to {:+.3g})".format(self.gain, *self.bounds)


RULE = Rule(
    code="prompt_ignored",
    signature="the loss on held-out rows is the same with the prompts of other rows",
    threshold=f"the 95% interval of the difference below {HARDLY_READ:.0%} of the loss",
    source="measured on this run's validation rows: the control of training-lens compare",
    action="check that prompts and answers belong together (labels shifted by a row, shuffled, or of another file), "
    "and that the prompt holds what the answer depends on; else train longer",
)
LOST = 3.0  # standard errors by which the base reads its prompts better
UNKNOWN = "Whether the answers depend on their prompts is not known"
TITLES = {
    "prompt_ignored": "The answers do not depend on their prompts",
    "prompt_hardly_used": "The answers hardly depend on their prompts",
}


def check_prompt_use(recording: Recording) -> Finding:
    """Whether answers depend on their prompts. No curve tells; a comparison measures it."""
    verdict = read_comparison_verdict(RunFolder(recording.folder))
    remark = next((each for each in (verdict.remarks if verdict else ()) if each.code.startswith("prompt_")), None)
    if remark is None:
        return _judge_swaps(recording)
    if remark.code == "prompt_used":
        return RULE.report_fine("The answers depend on their prompts", remark.sentence)
    if remark.code not in TITLES:
        decide = "training-lens compare with data.validation=FILE, a file of more rows"
        return RULE.report_inconclusive(UNKNOWN, remark.sentence, decide)
    return RULE.report_symptom(remark.severity, TITLES[remark.code], remark.sentence, confidence="sure")


def _judge_swaps(recording: Recording) -> Finding:
    """By what the run measured at its end."""
    held_out, base = (SwapGain.from_recording(recording, of) for of in ("swap", "base_swap"))
    test = "training-lens compare, whose control gives each answer the prompt of another row"
    if np.isnan(held_out.gain):
        return RULE.report_inconclusive(UNKNOWN, "no loss with the prompts of other rows", test)
    rows = int(finite_points(recording, tables.EVALUATION, "swap_rows")[1][-1])
    losses = finite_points(recording, tables.EVALUATION, "loss")[1]
    little = HARDLY_READ * float(losses[-1]) if len(losses) else np.nan
    measured = (
        f"at the end, prompts of other rows change the loss of {rows} held-out answers by {held_out} nats per token, "
        f"and by {base} in the base"
    )
    evidence = {"gain": held_out.gain, "error": held_out.error, "base_gain": base.gain, "base_error": base.error}
    low, high = held_out.bounds
    if low > 0 and high >= little:
        return RULE.report_fine("The answers depend on their prompts", measured, "likely", evidence)
    if high < little and base.bounds[0] > 0 and base.gain - held_out.gain > LOST * np.hypot(base.error, held_out.error):
        title = "The adapter ignores its prompts, which the base reads"
        return RULE.report_symptom("warning", title, measured, decide=test, evidence=evidence)
    return RULE.report_inconclusive(
        "The answers hardly depend on their prompts" if high < little else UNKNOWN, measured, test, evidence
    )
