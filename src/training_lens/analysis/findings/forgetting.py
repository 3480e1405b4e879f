"""Forgetting: the model still moves away from its base while held-out rows gain nothing more."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from training_lens.analysis.findings.evidence import (
    CERTAIN,
    LEAST,
    LEAST_RISE,
    HeldOut,
    measure_scatter,
    median_or_nan,
    read_curve,
    read_held_out,
    thin_points,
)
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.measures.curves import log_slope

CLIMB = 1.25  # KL at the end over KL when the held-out loss was best, or first about as good
NEAR_BASE = 0.05  # KL over the base's loss: below, there is little to forget
RULE = Rule(
    code="forgetting",
    signature="KL to the base still rises while the held-out loss is flat or rises",
    threshold=f"a KL {CLIMB:g} times that at the best held-out loss and over {NEAR_BASE:.0%} of the base's loss, with "
    f"a slope of its later half against ln(steps) beyond {CERTAIN:g} standard errors; or {CLIMB:g} times that in the "
    f"first half of the run, where that loss was within {LEAST_RISE:.0%} and its scatter of the best; and a held-out "
    "loss that does not fall in its later half. Inconclusive where KL is above the gain in nats per token",
    source="relative to this run; forward KL on the task's own rows predicts forgetting (arXiv 2509.04259)",
    action="use the checkpoint with the best held-out loss, train for fewer epochs (training.epochs), or lower "
    "training.lr: what the model moved since then bought nothing",
)


def check_forgetting(recording: Recording) -> Finding:
    """Whether the run moves away from its base without a gain on held-out rows."""
    steps, kl = read_curve(recording, tables.DIVERGENCE, "kl")
    held_out = read_held_out(recording)
    direction = held_out.find_direction()
    if direction == "unknown" or len(steps) < LEAST:
        losses = f"at least {LEAST} held-out losses: set data.validation or data.val_ratio, and training.eval_steps"
        kl_steps = f"KL at {LEAST} steps at least: lens.probe_every=1 measures it after each"
        return RULE.report_inconclusive(
            "Not enough data on forgetting",
            f"KL to the base at {len(steps)} steps, {len(held_out.steps)} held-out losses",
            f"a probe set, and {losses}" if not len(steps) else losses if direction == "unknown" else kl_steps,
        )
    found = _measure_climb(steps, kl, held_out)
    base = median_or_nan(read_curve(recording, tables.DIVERGENCE, "base_loss")[1])
    gain = base - float(read_curve(recording, tables.DIVERGENCE, "loss")[1][-1])
    measured = (
        f"KL to the base is {found.before:.3g} nats at step {found.step}, where the loss on the {held_out.what} is "
        f"{'best' if found.is_best else 'about as good as later'}, and {found.end:.3g} at the end, where that loss "
        f"{'is flat' if direction == 'flat' else direction}"
    )
    evidence = {"kl_at_best": found.before, "kl_end": found.end, "gain": gain, "kl": thin_points(x=steps, y=kl)}
    general = "the loss on general text: training-lens compare with data.validation=GENERAL_TEXT"
    climbs = found.end > CLIMB * found.before and found.end > NEAR_BASE * base
    if direction != "falls" and climbs and (found.still_climbs or (direction == "flat" and not found.is_best)):
        return RULE.report_symptom(
            "warning" if direction == "rises" else "note",
            "The model moves away from its base without a gain",
            measured,
            where=f"from step {found.step}",
            decide=general,
            evidence=evidence,
        )
    if found.end > gain:
        measured += f"; the gain on the probe set is {gain:.3g} nats per token"
        return RULE.report_inconclusive(
            "The model is farther from its base than it has gained", measured, general, evidence
        )
    return RULE.report_fine("No sign of forgetting", measured, "likely", evidence)


class _Climb(NamedTuple):
    """KL at the end, and before at the step where the held-out loss was best, or first about as good in the first half.

    `still_climbs`: it rises in its later half.
    """

    step: int
    before: float
    end: float
    is_best: bool
    still_climbs: bool


def _measure_climb(steps: np.ndarray, kl: np.ndarray, held_out: HeldOut) -> _Climb:
    best, losses = held_out.best_index, held_out.losses
    about = losses[best] * (1 + LEAST_RISE) + measure_scatter(*held_out.late_half())
    first = int(np.argmax(losses <= about))
    is_early = held_out.steps[first] <= steps[-1] / 2 and losses[best:].max() <= about
    step = int(held_out.steps[first if is_early else best])
    late = steps > steps[-1] / 2
    slope = log_slope(steps[late], kl[late])
    still_climbs = slope.value - CERTAIN * slope.error > 0
    return _Climb(
        step, float(np.interp(step, steps, kl)), median_or_nan(kl[-2:]), step == held_out.steps[best], still_climbs
    )
