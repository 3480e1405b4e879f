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
ROBUST_Z = 8.0
BOTH_Z = 4.0  # of the loss and of the gradient norm in the same step
ABOVE_MOST = 1.3  # times the highest loss of the window: a rare hard batch is no spike
LEAST_DEVIATION = 0.02  # of the logarithm: a loss that hardly varies makes no z
SMALLEST = 1e-6  # a loss of 0 has no logarithm
ROW_FACTOR = 2.0  # a row's loss over the highest usual loss of a step
BEFORE = 8  # steps before a spike in which an optimizer's spike is its cause
SPIKE_RULE = Rule(
    code="loss_spike",
    signature="a step's loss far above those before it; the update RMS of Adam spikes 1 to 8 steps before if the "
    "optimizer is the cause",
    threshold=f"a robust z over {ROBUST_Z:g} of its logarithm among the {WINDOW} steps before, or over {BOTH_Z:g} of "
    "the loss and of the gradient norm; and over "
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
        if len(self._usual) >= LEAST_STEPS:
            losses, norms = np.array(self._usual).T
            level, z = _compare_logarithms(loss, losses)
            is_far = z > ROBUST_Z or (z > BOTH_Z and _compare_logarithms(norm, norms)[1] > BOTH_Z)
            if is_far and loss > ABOVE_MOST * losses.max():
                spike = LossSpike(step, loss, level, z, float(losses.max()))
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
