"""A loss that jumps far above its recent level, and whether the rows of the step or the optimizer are the cause."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training_lens.analysis.findings.evidence import list_names
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.measures.curves import MAD_TO_DEVIATION

WINDOW, LEAST_STEPS = 64, 20  # steps before that define the level
ROBUST_Z = 8.0
ABOVE_MOST = 1.3  # times the highest loss of the window: a rare hard batch is no spike
LEAST_DEVIATION = 0.02  # of the logarithm: a loss that hardly varies makes no z
SMALLEST = 1e-6  # a loss of 0 has no logarithm
ROW_FACTOR = 2.0  # a row's loss over the highest usual loss of a step
RMS_SPIKE, RMS_STEADY = 3.0, 1.0  # times the usual update RMS, and that of constant gradients
BEFORE = 8  # steps before a spike in which an optimizer's spike is its cause
SPIKE_RULE = Rule(
    code="loss_spike",
    signature="a step's loss far above those before it; the update RMS of Adam spikes 1 to 8 steps before if the "
    "optimizer is the cause",
    threshold=f"a robust z over {ROBUST_Z:g} of its logarithm among the {WINDOW} steps before, and over "
    f"{ABOVE_MOST:g} times the highest of them; an update RMS over {RMS_SPIKE:g} times its median and over "
    f"{RMS_STEADY:g}",
    source="relative to this run; update RMS: arXiv 2304.13013",
    action="look at the rows of this step; lower training.lr or training.max_grad_norm if it comes again",
)
BATCH_RULE = Rule(
    code="poisoned_batch",
    signature="a step's loss far above those before it, and rows of the step whose loss is far above all usual ones",
    threshold=f"{SPIKE_RULE.threshold}; rows over {ROW_FACTOR:g} times the highest usual loss of a step",
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
    """Watches the losses of the steps. Losses of a spike do not become part of the level."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=WINDOW)

    def observe(self, step: int, loss: float) -> LossSpike | None:
        """The spike at this step; None if its loss is usual, or too few steps came before."""
        usual = np.array(self._usual)
        spike = _compare_loss(step, loss, usual) if len(usual) >= LEAST_STEPS else None
        if spike is None and np.isfinite(loss):
            self._usual.append(loss)
        return spike


def _compare_loss(step: int, loss: float, usual: np.ndarray) -> LossSpike | None:
    logs = np.log(np.maximum(usual, SMALLEST))  # losses of small batches are skewed: their logarithms are not
    level, most = float(np.median(logs)), float(usual.max())
    deviation = max(MAD_TO_DEVIATION * float(np.median(np.abs(logs - level))), LEAST_DEVIATION)
    z = (np.log(max(loss, SMALLEST)) - level) / deviation
    return LossSpike(step, loss, float(np.exp(level)), z, most) if z > ROBUST_Z and loss > ABOVE_MOST * most else None


def report_spike(
    spike: LossSpike, rows: Sequence[tuple[str, float]], update_rms: tuple[np.ndarray, np.ndarray], is_exact: bool
) -> Finding:
    """The finding of a spike: its rows, the optimizer, or neither.

    Args:
        rows: the id of each row of the step, and its loss per supervised token after the step; NaN if not measured.
        update_rms: (steps,) steps and the median update RMS over modules.
        is_exact: whether every step's update RMS was captured.
    """
    odd = sorted((pair for pair in rows if pair[1] > ROW_FACTOR * spike.most), key=lambda pair: -pair[1])
    evidence = {"step": spike.step, "z": spike.z, "rows": [list(pair) for pair in sorted(rows, key=lambda p: -p[1])]}
    where = f"step {spike.step}"
    if odd:
        named = list_names([f"{name} ({loss:.3g})" for name, loss in odd])
        measured = f"{spike.describe()}; {len(odd)} of its {len(rows)} rows have a loss far above: {named}"
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
    names = list_names([name for name, _ in rows])
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
