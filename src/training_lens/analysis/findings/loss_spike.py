"""A loss that jumps far above its recent level, and whether the rows of the step or the optimizer are the cause."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training_lens.analysis.findings.evidence import list_names
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.rate_high import RMS_SPIKE, RMS_STEADY
from training_lens.measures.curves import MAD_TO_DEVIATION

WINDOW, LEAST_STEPS = 64, 20  # steps before that define the level
EARLY_STEPS, NEAREST = 6, 3  # with so many, the level is that of the last ones, as the loss still falls
EARLY_DEVIATION = 0.05  # at least, of the changes from step to step: few of them tell little
ROBUST_Z = 8.0
BOTH_Z = 4.0  # of the loss and of the gradient norm in the same step
ABOVE_MOST = 1.3  # times the highest loss of the window: a rare hard batch is no spike
LEAST_DEVIATION = 0.02  # of the logarithm: a loss that hardly varies makes no z
SMALLEST = 1e-6  # a loss of 0 has no logarithm
ROW_FACTOR = 2.0  # a row's loss over the highest usual loss of a step
HARD = 1.2  # the base's loss on a row, over the median on other rows: hard before any training
RECURRING = 0.85  # the base's loss on rows like it, over that on the row: such rows belong to the data
BEFORE = 8  # steps before a spike in which an optimizer's spike is its cause
SPIKE_RULE = Rule(
    code="loss_spike",
    signature="a step's loss far above those before it; the update RMS of Adam spikes 1 to 8 steps before if the "
    "optimizer is the cause",
    threshold=f"a robust z over {ROBUST_Z:g} of its logarithm among the {WINDOW} steps before, or over {BOTH_Z:g} of "
    "the loss and of the gradient norm; and over "
    f"{ABOVE_MOST:g} times the highest of them (of the steps before the {LEAST_STEPS}th, by the changes from step to "
    f"step); an update RMS over {RMS_SPIKE:g} times its median and over {RMS_STEADY:g}. Rows that are as hard for the "
    "base as others like them are no spike",
    source="relative to this run; update RMS: arXiv 2304.13013",
    action="look at the rows of this step; lower training.lr or training.max_grad_norm if it comes again",
)
BATCH_RULE = Rule(
    code="poisoned_batch",
    signature="a step's loss far above those before it, and rows of the step whose loss is far above all usual ones, "
    "or that are hard for the base as no other rows are",
    threshold=f"{SPIKE_RULE.threshold}; rows over {ROW_FACTOR:g} times the highest usual loss of a step, or with a "
    f"loss of the base over {HARD:g} times its median on 16 other rows and over {1 / RECURRING:.2g} times that on the "
    "16 rows that resemble them most",
    source="relative to this run",
    action="look at the named rows: garbage, another language, or a broken template; remove them and train again",
)


@dataclass(frozen=True)
class LossSpike:
    """The loss of one step far above its level; `most` is the highest usual loss of the steps before."""

    step: int
    loss: float
    level: float
    z: float
    most: float

    def describe(self) -> str:
        """The loss, where it was before, and how unusual that is."""
        before = f"a median of {self.level:.3g} before (robust z {self.z:.0f})"
        return f"the loss of step {self.step} is {self.loss:.3g}, with {before}"


class SpikeDetector:
    """Watches loss and gradient norm of the steps. A spike becomes part of the level when it is over."""

    def __init__(self) -> None:
        self._usual: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._spiking: list[tuple[float, float]] = []

    def observe(self, step: int, loss: float, norm: float) -> LossSpike | None:
        """The spike at this step; None if its loss is usual, or too few steps came before.

        Args:
            norm: of the step's gradient, before clipping.
        """
        spike = None
        most = max((usual for usual, _ in self._usual), default=0.0)
        if len(self._usual) >= EARLY_STEPS and loss > ABOVE_MOST * most:  # first, as hardly a step gets further
            losses, norms = np.array(self._usual).T
            compare = _compare_logarithms if len(losses) >= LEAST_STEPS else _compare_changes
            level, z = compare(loss, losses)
            if z > ROBUST_Z or (z > BOTH_Z and compare(norm, norms)[1] > BOTH_Z):
                spike = LossSpike(step, loss, level, z, most)
        if np.isfinite(loss) and np.isfinite(norm):
            self._spiking.append((loss, norm))
        if spike is None:
            self._usual.extend(self._spiking)
            self._spiking = []
        return spike


def _compare_logarithms(value: float, usual: np.ndarray) -> tuple[float, float]:
    """The usual level, and the robust z of a value: of logarithms, as losses of small batches are skewed."""
    logs = np.log(np.maximum(usual, SMALLEST))
    level = float(np.median(logs))
    deviation = max(MAD_TO_DEVIATION * float(np.median(np.abs(logs - level))), LEAST_DEVIATION)
    return float(np.exp(level)), float((np.log(max(value, SMALLEST)) - level) / deviation)


def _compare_changes(value: float, usual: np.ndarray) -> tuple[float, float]:
    """As `_compare_logarithms`, of a series that still falls: against its last values, in units of its changes."""
    logs = np.log(np.maximum(usual, SMALLEST))
    level, changes = float(np.median(logs[-NEAREST:])), np.diff(logs)
    deviation = MAD_TO_DEVIATION * float(np.median(np.abs(changes - np.median(changes))))
    return float(np.exp(level)), float((np.log(max(value, SMALLEST)) - level) / max(deviation, EARLY_DEVIATION))


@dataclass(frozen=True)
class RowLoss:
    """A row's loss per supervised token, after the step and in the base; NaN if not measured."""

    id: str
    loss: float
    base: float


@dataclass(frozen=True)
class SpikeRows:
    """The rows of a step; and the base's losses on other rows, and on those that resemble the hardest of the step."""

    rows: Sequence[RowLoss]
    others: np.ndarray
    similar: np.ndarray

    @property
    def hard_rows(self) -> list[RowLoss]:
        """Those that are harder for the base than other rows; none where that was not measured."""
        return [row for row in self.rows if len(self.others) and row.base > HARD * float(np.median(self.others))]

    @property
    def are_usual(self) -> bool:
        """Whether the step's rows are hard, and so are others like them: a hard part of the data, and no event."""
        hard = self.hard_rows
        if not hard or not len(self.similar):
            return False
        return float(np.median(self.similar)) > RECURRING * float(np.median([row.base for row in hard]))


def report_spike(
    spike: LossSpike, batch: SpikeRows, update_rms: tuple[np.ndarray, np.ndarray], is_exact: bool
) -> Finding | None:
    """The finding of a spike: its rows, the optimizer, or neither; None if the rows are of a hard part of the data.

    Args:
        update_rms: (steps,) steps and the median update RMS over modules.
        is_exact: whether every step's update RMS was captured.
    """
    if batch.are_usual:
        return None
    rows = sorted(batch.rows, key=lambda row: -row.loss)
    odd = batch.hard_rows or [row for row in rows if row.loss > ROW_FACTOR * spike.most]
    evidence = {"step": spike.step, "z": spike.z, "rows": [[row.id, row.loss, row.base] for row in rows]}
    where = f"step {spike.step}"
    if odd:
        named = list_names([f"{row.id} ({row.loss:.3g})" for row in sorted(odd, key=lambda row: -row.loss)])
        hard = f", and {np.median([row.base for row in odd]):.3g} in the base" if batch.hard_rows else ""
        usual = f", where others have {np.median(batch.others):.3g}" if hard else ""
        measured = f"{spike.describe()}; {len(odd)} of its {len(rows)} rows have a loss far above{hard}{usual}: {named}"
        return BATCH_RULE.report_symptom("warning", "A batch is poisoned", measured, where=where, evidence=evidence)
    before = _find_update_spike(spike.step, *update_rms)
    if before is not None:
        measured = f"{spike.describe()}; the update RMS of Adam was {before[1]:.2g} at step {before[0]}"
        return SPIKE_RULE.report_symptom(
            "warning",
            "The loss spikes after a spike of the optimizer's updates",
            measured,
            where=where,
            action="lower Adam's beta2 or training.lr, or clip more (training.max_grad_norm)",
            evidence=evidence,
        )
    unknown = "" if is_exact else "; the update RMS of the steps before was not captured at each"
    names = list_names([row.id for row in rows])
    return SPIKE_RULE.report_symptom(
        "warning",
        "The loss spikes",
        f"{spike.describe()}; no row of it stands out{unknown}. Its rows: {names}",
        where=where,
        decide="lens.scalars_every=1, and whether the loss spikes at other rows too",
        evidence=evidence,
    )


def _find_update_spike(step: int, steps: np.ndarray, rms: np.ndarray) -> tuple[int, float] | None:
    """The highest update RMS of the 8 steps before, if it is a spike."""
    near, usual = (steps < step) & (steps >= step - BEFORE), rms[steps < step - BEFORE]
    if not near.any() or not len(usual):
        return None
    place = int(np.argmax(np.where(near, rms, -np.inf)))
    is_spike = rms[place] > RMS_SPIKE * max(float(np.median(usual)), RMS_STEADY)
    return (int(steps[place]), float(rms[place])) if is_spike else None
