"""Forgetting: the model still moves away from its base while held-out rows gain nothing more."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.evidence import (
    CERTAIN,
    LEAST,
    median_or_nan,
    read_curve,
    read_held_out,
    thin_points,
)
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.measures.curves import log_slope

CLIMB = 1.25  # KL at the end over KL when the held-out loss was best
NEAR_BASE = 0.05  # KL over the base's loss: below, there is little to forget
RULE = Rule(
    code="forgetting",
    signature="KL to the base still rises while the held-out loss is flat or rises",
    threshold=f"a slope of the later half of KL against ln(steps) beyond {CERTAIN:g} standard errors, a KL {CLIMB:g} "
    f"times that at the best held-out loss and over {NEAR_BASE:.0%} of the base's loss, and a held-out loss that does "
    "not fall in its later half",
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
        return RULE.report_inconclusive(
            "Not enough data on forgetting",
            f"KL to the base at {len(steps)} steps, {len(held_out.steps)} held-out losses",
            f"a probe set, and at least {LEAST} held-out losses: set data.validation or data.val_ratio, and "
            "training.eval_steps",
        )
    best = int(held_out.steps[held_out.best_index])
    late = steps > steps[-1] / 2
    slope = log_slope(steps[late], kl[late])
    end = median_or_nan(kl[-2:])
    at_best = float(np.interp(best, steps, kl))
    base = median_or_nan(read_curve(recording, tables.DIVERGENCE, "base_loss")[1])
    measured = (
        f"KL to the base is {at_best:.3g} nats at step {best}, where the loss on the {held_out.what} is best, and "
        f"{end:.3g} at the end, where that loss {'is flat' if direction == 'flat' else direction}"
    )
    evidence = {"kl_at_best": at_best, "kl_end": end, "kl": thin_points(x=steps, y=kl)}
    climbs = end > CLIMB * at_best and slope.value - CERTAIN * slope.error > 0 and end > NEAR_BASE * base
    if direction == "falls" or not climbs:
        return RULE.report_fine("No sign of forgetting", measured, "likely", evidence)
    return RULE.report_symptom(
        "warning" if direction == "rises" else "note",
        "The model moves away from its base without a gain",
        measured,
        where=f"from step {best}",
        decide="the loss on general text: training-lens compare with data.validation=GENERAL_TEXT",
        evidence=evidence,
    )
