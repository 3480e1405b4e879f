"""Overfitting: training rows are memorized."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from training_lens.analysis.findings.evidence import (
    ABOVE_BEST,
    CERTAIN,
    LEAST,
    LEAST_RISE,
    HeldOut,
    median_or_nan,
    read_curve,
    read_held_out,
    thin_points,
)
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.measures.curves import epoch_drops, log_slope

FAR_UNDER = 0.5  # training loss over held-out loss at the end
RULE = Rule(
    code="memorization",
    signature="the training loss keeps falling, drops at epoch ends or is far below the held-out loss, while the "
    "held-out loss is flat or rises",
    threshold=f"slope of the later half of the held-out loss against ln(steps), and drops at epoch ends, beyond "
    f"{CERTAIN:g} standard errors; or an end {ABOVE_BEST:g} times the scatter above the best; a rise over "
    f"{LEAST_RISE:.0%} of the lowest loss; a training loss below {FAR_UNDER:g} of the held-out loss",
    source="relative to this run; drops at epoch ends are regression discontinuities (Imbens and Lemieux 2008) and are "
    "0 on rows not seen before",
    action="train for fewer epochs (training.epochs), or use the checkpoint with the best held-out loss "
    "(training.early_stopping_patience stops there)",
)


class _EpochDrops(NamedTuple):
    """The mean drop of the training loss at epoch ends, its standard error, and the number of ends."""

    drop: float
    error: float
    ends: int

    @property
    def is_significant(self) -> bool:
        return self.ends > 0 and self.drop > CERTAIN * self.error


def check_memorization(recording: Recording) -> Finding:
    """Whether the run overfits: the training loss still improves while the held-out loss does not."""
    steps, losses = read_curve(recording, tables.LOSS, "loss")
    per_epoch = _steps_per_epoch(recording)
    if len(steps) and per_epoch and steps[-1] <= per_epoch:
        return RULE.report_fine("No row was seen twice", f"the run is {steps[-1] / per_epoch:.0%} of an epoch long")
    held_out, drops = read_held_out(recording), _measure_drops(steps, losses, per_epoch)
    if held_out.find_direction() == "unknown" or len(steps) < LEAST:
        return RULE.report_inconclusive(
            "Not enough data on overfitting",
            f"{len(held_out.steps)} held-out losses, {len(steps)} training losses; {_describe_drops(drops)}",
            f"at least {LEAST} held-out losses: set data.validation or data.val_ratio, and training.eval_steps",
        )
    late = median_or_nan(losses[-max(LEAST, len(losses) // 10) :])
    since = steps >= held_out.steps[held_out.best_index]
    slope = log_slope(steps[since], losses[since])
    has_training_gain = late < FAR_UNDER * held_out.losses[-1] or slope.value + CERTAIN * slope.error < 0
    return _decide(held_out, drops, bool(has_training_gain), late)


def _decide(held_out: HeldOut, drops: _EpochDrops, has_training_gain: bool, late: float) -> Finding:
    direction, best = held_out.find_direction(), int(held_out.steps[held_out.best_index])
    then = {"rises": f"has risen by {held_out.final_rise:.3g}", "flat": "is flat"}.get(direction, "still falls")
    measured = (
        f"the {held_out.what}'s loss is best at step {best} ({held_out.losses[held_out.best_index]:.3g}), and {then} "
        f"at the end; the training loss ends at {late:.3g}; {_describe_drops(drops)}"
    )
    evidence = {
        "best_step": best,
        "rise": held_out.final_rise,
        "drop": drops.drop,
        "drop_error": drops.error,
        "held_out": thin_points(x=held_out.steps, y=held_out.losses),
    }
    where = f"from step {best}"
    if direction == "rises" and (has_training_gain or drops.is_significant):
        return RULE.report_symptom("warning", "Overfitting", measured, where=where, evidence=evidence)
    if direction == "flat" and drops.is_significant:
        title = "The training loss improves only on repeated rows"
        return RULE.report_symptom("note", title, measured, where=where, evidence=evidence)
    if direction == "rises":
        return RULE.report_inconclusive(
            "The held-out loss rises, and the training loss does not fall",
            measured,
            "a run at half the learning rate: with overfitting, the rise remains",
            evidence,
        )
    return RULE.report_fine("No overfitting", measured, "likely", evidence)


def _steps_per_epoch(recording: Recording) -> float:
    """From the settings, or from the logged epochs; 0 if neither is known."""
    known = recording.settings.get("steps_per_epoch")
    if known:
        return float(known)
    steps, epochs = read_curve(recording, tables.LOSS, "epoch")
    return float(steps[-1] / epochs[-1]) if len(epochs) and epochs[-1] > 0 else 0.0


def _measure_drops(steps: np.ndarray, losses: np.ndarray, per_epoch: float) -> _EpochDrops:
    drops = epoch_drops(steps, losses, per_epoch, max(1, int(per_epoch))) if per_epoch >= 1 and len(steps) else []
    known = [drop for drop in drops if np.isfinite(drop.error)]
    if not known:
        return _EpochDrops(np.nan, np.nan, 0)
    error = np.sqrt(sum(drop.error**2 for drop in known)) / len(known)
    return _EpochDrops(float(np.mean([drop.drop for drop in known])), float(error), len(known))


def _describe_drops(drops: _EpochDrops) -> str:
    if not drops.ends:
        return "no drop at an epoch end could be measured"
    ends = f"at {drops.ends} epoch ends" if drops.ends > 1 else "at an epoch end"
    if not drops.is_significant:
        return f"the training loss has no significant drop {ends}"
    return f"the training loss drops by {drops.drop:.3g} {ends} (standard error {drops.error:.2g})"
