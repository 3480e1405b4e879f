"""A learning rate that is too low."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.evidence import (
    CERTAIN,
    LEAST,
    median_or_nan,
    median_over_modules,
    read_curve,
    read_held_out,
    thin_points,
)
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.interventions import Claim, decide_finding, read_interventions
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.measures.curves import log_slope

LEAST_STEPS = 50  # a short run moves straight at any rate
STRAIGHT = 0.8
BENT = 0.6  # below, dW has turned often enough to rule a low rate out
ALIGNED = 0.3
NEAR_BASE = 0.01  # KL over the base's loss
FALLS_ON = 0.4  # late slope over early slope
SETTLED, SOLVED = 0.02, 0.25  # of the loss in an e-fold of steps; of the first loss
RULE = Rule(
    code="rate_low",
    signature="the loss falls to the end about as fast as before against the logarithm of the learning rate's sum; dW "
    "moves in a straight line; gradients agree in direction; KL to the base is near 0",
    threshold=f"dW moves straight (|dW| over {STRAIGHT:g} of the sum of its steps), and two of: a slope of the later "
    f"half over {FALLS_ON:g} of the earlier slope; a cosine with the mean of earlier gradients over {ALIGNED:g}; KL "
    f"below {NEAR_BASE:.0%} of the base's loss. Ruled out only if dW turns (below {BENT:g}) or the loss has settled",
    source="a random walk of n steps has a straightness of 1/sqrt(n), a line 1. On the packaged model it was 0.46 at "
    "the best rate, 0.86 at a thirtieth and 0.94 at a three-hundredth of it (120 steps)",
    action="raise training.lr: LoRA's best rate is about ten times that of full fine-tuning (LoRA Without Regret)",
)


CLAIM = Claim(
    question="rate",
    change="higher",
    better="The learning rate is too low",
    open="The learning rate may be too low",
    fine="The learning rate is not too low",
    action="raise the rate: {setting}, or more if that still gains",
    trusts_short_gain=False,  # the shorter a run, the higher its best rate
    trusts_short_loss=True,
)


def check_rate_low(recording: Recording) -> Finding:
    """Whether the learning rate is too low for the length of the run: by test runs, or else by its curves."""
    return decide_finding(RULE, _check_curves(recording), read_interventions(recording.folder), CLAIM)


def _check_curves(recording: Recording) -> Finding:
    (steps, losses), straight = read_curve(recording, tables.LOSS, "loss"), measure_straightness(recording)
    if len(steps) < LEAST_STEPS or np.isnan(straight):
        return RULE.report_inconclusive(
            "Not enough data on a low learning rate",
            f"the loss of {len(steps)} steps" + (", no complete path of dW" if np.isnan(straight) else ""),
            f"at least {LEAST_STEPS} steps, each captured (lens.scalars_every=1)",
        )
    # the loss of single steps is noisy: held-out losses are better if there are enough
    held_out = read_held_out(recording)
    by_held_out = len(held_out.steps) >= 2 * LEAST
    curve = (held_out.steps, held_out.losses) if by_held_out else (steps, losses)
    curve = _sum_rates(recording, curve[0]), curve[1]
    falls = _is_still_falling(*curve)
    ahead, others = straight > STRAIGHT, _detect_other_signs(recording)
    measured = [f"|dW| is {straight:.2f} of the length of its path (1 is a straight line)", *others]
    measured += ["the loss falls as fast as before"] if falls else []
    evidence = {"straightness": straight, "loss": thin_points(x=steps, y=losses)}
    if ahead and len(others) + falls >= 2:  # two signs without a falling loss: the rate is so low that it never fell
        return RULE.report_symptom("warning", "The learning rate is too low", "; ".join(measured), evidence=evidence)
    is_ruled_out = straight < BENT or _is_settled(recording, *curve)
    if not is_ruled_out or (falls and (straight > BENT or others)):
        return RULE.report_inconclusive(
            "The learning rate may be too low",
            "; ".join(measured if is_ruled_out else [*measured, "the loss has not settled"]),
            "a run with the same seed and length at three times the rate: its loss is lower if this rate is too low",
            evidence,
        )
    return RULE.report_fine("The learning rate is not too low", "; ".join(measured), "likely", evidence)


def _sum_rates(recording: Recording, steps: np.ndarray) -> np.ndarray:
    """The sum of learning rates up to each step, over their mean: a rate that falls settles no loss.

    The steps themselves where no rate is known.
    """
    known, rates = read_curve(recording, tables.LOSS, "lr")
    if not len(known) or not rates.any():
        return steps.astype(np.float64)
    every = np.interp(np.arange(1, max(known[-1], steps[-1]) + 1), known, rates)
    sums: np.ndarray = (np.cumsum(every) / every.mean())[steps - 1]
    return sums


def _is_still_falling(steps: np.ndarray, values: np.ndarray) -> bool:
    """Whether the slope against ln(steps) of the later half is significant and not much smaller than the one before."""
    late, early = steps > steps[-1] / 2, (steps > steps[-1] / 8) & (steps <= steps[-1] / 2)
    now, before = log_slope(steps[late], values[late]), log_slope(steps[early], values[early])
    return bool(now.value + CERTAIN * now.error < 0 and now.value <= FALLS_ON * min(before.value, 0.0))


def _is_settled(recording: Recording, steps: np.ndarray, values: np.ndarray) -> bool:
    """Whether the later half surely changes by less than 2 % in an e-fold of steps, or the loss is nearly gone."""
    late = steps > steps[-1] / 2
    level, start = median_or_nan(values[late]), read_curve(recording, tables.LOSS, "loss")[1][0]
    slope = log_slope(steps[late], values[late])
    return bool(level < SOLVED * start or abs(slope.value) + CERTAIN * slope.error < SETTLED * level)


def measure_straightness(recording: Recording) -> float:
    """|dW| at the end over the length of its path, median over modules; NaN with too few steps.

    The path is the integral of the step norms over the steps (trapezoids), so that thinned captures are enough.
    """
    moves, update = (recording.series(tables.WEIGHTS, measure) for measure in ("norm_step", "norm_update"))
    kept = (moves.steps > 0) & np.isfinite(moves.values).all(1)
    if kept.sum() < LEAST_STEPS or moves.names != update.names:
        return np.nan
    steps, norms = moves.steps[kept], moves.values[kept]
    path = norms[0] * steps[0] + np.trapezoid(norms, steps, axis=0)
    return median_or_nan((update.values[-1] / np.where(path > 0, path, np.inf))[path > 0])


def _detect_other_signs(recording: Recording) -> list[str]:
    """Gradients that agree in direction, and predictions that are still the base's."""
    signs = []
    _, cosines = median_over_modules(recording.series(tables.GRADIENTS, "cosine_mean"))
    level = median_or_nan(cosines[len(cosines) // 2 :])
    if level > ALIGNED:
        signs.append(f"gradients have a cosine of {level:.2f} with the mean of earlier ones")
    steps, kl = read_curve(recording, tables.DIVERGENCE, "kl")
    base = median_or_nan(read_curve(recording, tables.DIVERGENCE, "base_loss")[1])
    if len(kl) and kl[-1] < NEAR_BASE * base:
        signs.append(f"KL to the base is {kl[-1]:.2g} nats after step {steps[-1]}")
    return signs
