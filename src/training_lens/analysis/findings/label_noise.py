"""Training rows whose answers are those of other rows, or wrong."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.prompt_use import SwapGain
from training_lens.core.recording import Recording

ERRORS = 3.0  # standard errors
WRONG = 0.1  # share of the training rows with wrong answers, at least
RULE = Rule(
    code="label_noise",
    signature="swapping prompts between rows raises the loss of training answers less than that of held-out answers",
    threshold=f"{ERRORS:g} standard errors, and {WRONG:.0%} of the held-out gain",
    source="measured at the end of the run; an answer that belongs to another prompt gains nothing from its own, "
    "unless it was memorized",
    action="read some of the training rows: their answers may be those of other rows",
)
TEST = (
    "reading 30 random training rows: of 30% wrong answers, 9 are among them; or training-lens compare with "
    "data.validation=TRAINING_FILE, and without, once the run reads its prompts"
)
UNKNOWN = "Whether the training answers belong to their prompts is not known"


def check_label_noise(recording: Recording) -> Finding:
    """Whether training answers belong to their prompts as held-out ones do; never fine: wrong ones may be memorized."""
    held_out, train = (SwapGain.from_recording(recording, of) for of in ("swap", "train_swap"))
    if np.isnan(held_out.gain) or np.isnan(train.gain):
        return RULE.report_inconclusive(UNKNOWN, "no loss with the prompts of other rows", TEST)
    measured = (
        f"prompts of other rows change the loss of held-out answers by {held_out} nats per token, and of training "
        f"answers by {train}"
    )
    evidence = {"gain": held_out.gain, "train_gain": train.gain}
    missing, error = held_out.gain - train.gain, float(np.hypot(held_out.error, train.error))
    if held_out.bounds[0] <= 0 or missing <= max(ERRORS * error, WRONG * held_out.gain):
        return RULE.report_inconclusive(UNKNOWN, measured, TEST, evidence)
    measured += f": as if {min(1.0, missing / held_out.gain):.0%} of the training answers were those of other prompts"
    return RULE.report_symptom(
        "warning", "Training answers do not belong to their prompts", measured, decide=TEST, evidence=evidence
    )
