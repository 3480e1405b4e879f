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

FAR_UNDER = 0.5  # training loss over held-out loss at the end, relative to the base's: memorized
UNDER = 0.75  # likewise: perhaps
EASIER = 0.5  # the lowest ratio of the base's losses that is taken for easier rows
LEAST_GAP = 0.05  # of the base's loss: a smaller gap matters to nobody
SELDOM = 1.05  # visits of a row: below, repeated rows are few enough to leave out
RULE = Rule(
    code="memorization",
    signature="the training loss keeps falling, drops at epoch ends or is far below the held-out loss, while the "
    "held-out loss is flat or rises; or rows seen again have a far lower loss than held-out ones, which may fall too",
    threshold=f"slope of the later half of the held-out loss against ln(steps), and drops at epoch ends, beyond "
    f"{CERTAIN:g} standard errors; or an end {ABOVE_BEST:g} times the scatter above the best; a rise over "
    f"{LEAST_RISE:.0%} of the lowest loss; a training loss below {FAR_UNDER:g} of the held-out loss (inconclusive "
    f"below {UNDER:g}), relative to that ratio before training where that was lower than 1, and by {LEAST_GAP:.0%} of "
    "the base's loss",
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
    if (
        len(steps)
        and per_epoch
        and steps[-1] <= per_epoch
        and (once := _check_visits(recording, steps[-1] / per_epoch))
    ):
        return once
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
    return _decide(held_out, drops, bool(has_training_gain), _measure_gap(held_out, steps, losses, late))


def _check_visits(recording: Recording, epochs: float) -> Finding | None:
    """For a run of at most an epoch: fine if its rows differ from each other; None if they repeat."""
    visits = recording.settings.get("visits_per_epoch")
    length = f"the run is {epochs:.0%} of an epoch long"
    if visits is None:
        measured = f"{length}; whether its rows differ from each other was not recorded"
        return RULE.report_fine("No row was seen twice", measured, "likely")
    distinct = recording.settings.get("distinct_examples")
    if visits == 1:
        return RULE.report_fine("No row was seen twice", f"{length}, and its {distinct} rows differ from each other")
    if visits < SELDOM:
        measured = f"{length}; it visits each of {distinct} different rows {visits:.3g} times on average"
        return RULE.report_fine("Hardly a row was seen twice", measured, "likely")
    return None


class _Gap(NamedTuple):
    """Training and held-out loss at the end, the ratio of both, and that of the base's losses on the same rows."""

    late: float
    held_out: float
    base_ratio: float
    least: float

    @property
    def ratio(self) -> float:
        """The training loss over the held-out loss, relative to the base's where its training rows were easier."""
        return self.late / self.held_out / self.base_ratio if self.held_out > 0 else np.nan

    @property
    def is_wide(self) -> bool:
        return self.held_out - self.late > self.least and self.ratio < UNDER

    def describe(self) -> str:
        """The ratio, and why it is not that of the losses where it is not."""
        before = f" (relative to {self.base_ratio:.2f} before training)" if self.base_ratio < 1 else ""
        return f"it is {self.ratio:.2f} of the held-out loss{before}"


def _measure_gap(held_out: HeldOut, steps: np.ndarray, losses: np.ndarray, late: float) -> _Gap:
    """`losses` are those of the steps; the first, if it is step 1's, is the base's, as B starts at 0."""
    start = held_out.start if np.isfinite(held_out.start) else float(losses[0])
    base_ratio = float(np.clip(losses[0] / start, EASIER, 1)) if steps[0] == 1 and start > 0 else 1.0
    return _Gap(late, float(held_out.losses[-1]), base_ratio, LEAST_GAP * start)


def _decide(held_out: HeldOut, drops: _EpochDrops, has_training_gain: bool, gap: _Gap) -> Finding:
    direction, best = held_out.find_direction(), int(held_out.steps[held_out.best_index])
    then = {"rises": f"has risen by {held_out.final_rise:.3g}", "flat": "is flat"}.get(direction, "still falls")
    measured = (
        f"the loss on the {held_out.what} is best at step {best} ({held_out.losses[held_out.best_index]:.3g}), and "
        f"{then} at the end; the training loss ends at {gap.late:.3g}: {gap.describe()}; {_describe_drops(drops)}"
    )
    evidence = {
        "best_step": best,
        "rise": held_out.final_rise,
        "ratio": gap.ratio,
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
    if gap.is_wide:
        return _report_gap(gap, direction == "falls", measured, evidence)
    return RULE.report_fine("No overfitting", measured, "likely", evidence)


def _report_gap(gap: _Gap, still_falls: bool, measured: str, evidence: dict[str, object]) -> Finding:
    """Rows that were seen again fit far better than others: memorized, even where the others still gain."""
    if gap.ratio >= FAR_UNDER:
        return RULE.report_inconclusive(
            "The training rows fit better than held-out rows",
            measured,
            "the share of exact answers on training rows and on held-out rows: training-lens compare with "
            "data.validation=TRAINING_FILE, and without",
            evidence,
        )
    return RULE.report_symptom(
        "note" if still_falls else "warning",
        "Training rows are memorized" + (", while held-out rows still gain" if still_falls else ""),
        measured,
        action="more rows help most; each further epoch (training.epochs) fits these rows more than others"
        if still_falls
        else RULE.action,
        decide="the share of exact answers on training rows and on held-out rows",
        evidence=evidence,
    )


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
