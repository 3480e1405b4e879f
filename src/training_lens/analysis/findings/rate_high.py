"""A learning rate that is too high."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training_lens.analysis.findings.evidence import (
    CERTAIN,
    median_or_nan,
    median_over_modules,
    read_curve,
    read_held_out,
    thin_points,
)
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.interventions import Claim, decide_finding, read_interventions
from training_lens.analysis.findings.rate_low import measure_straightness
from training_lens.analyzers.module_groups import update_strength
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import Series
from training_lens.measures.curves import point_noise

LEAST_STEPS = 10
OUTGROWN = 1.0  # |dW| / |W|
RMS_SPIKE = 3.0  # times the median of the run, or RMS_STEADY if that is larger
RMS_STEADY = 1.0  # of constant gradients
LEAST_SPIKES = 3
RMS_STUCK = 0.1
FIRST = 5  # steps that define the starting loss: a single batch may be easy
CLIMB = 1.5
NEEDED = 2  # signs
RULE = Rule(
    code="rate_high",
    signature="the loss rises above its start; dW outgrows W; Adam's update RMS spikes, or stays low after a gradient "
    "spike; most steps are clipped, and increasingly so; KL rises while the held-out loss does not improve; dW "
    "goes back and forth",
    threshold=f"{NEEDED} of these signs: a loss above its start (the highest of step 1, the median of the first "
    f"{FIRST} steps and the base's held-out loss) by {CERTAIN:g} times the noise of a step; a median |dW| / |W| over "
    f"{OUTGROWN:g}; an update RMS over {RMS_SPIKE:g} times the run's median and over {RMS_STEADY:g} (constant "
    f"gradients) in {LEAST_SPIKES} steps and 1% of them, or below {RMS_STUCK:g} at the end; over half of the steps "
    f"clipped, at the end to less than half of before; KL {CLIMB:g} times that of mid-run; |dW| below that of a "
    "random walk of as many steps",
    source="relative to this run (background: arXiv 2304.13013 on spikes of Adam's update RMS, arXiv 2410.21228). On "
    "the packaged model |dW| / |W| ended at 0.3 at the best rate and 6 at ten times it, RMS at 0.7 and 0.01",
    action="halve training.lr (or lower: good rates differ by factors), or warm up longer (training.warmup_ratio)",
)


CLAIM = Claim(
    question="rate",
    change="lower",
    better="The learning rate is too high",
    open="The learning rate may be too high",
    fine="The learning rate is not too high",
    action="lower the rate: {setting}, or less if that still gains",
    trusts_short_gain=True,
    trusts_short_loss=False,  # the longer a run, the lower its best rate
)


def check_rate_high(recording: Recording) -> Finding:
    """Whether the learning rate is too high: by test runs, or else by its curves."""
    return decide_finding(RULE, _check_curves(recording), read_interventions(recording.folder), CLAIM)


def _check_curves(recording: Recording) -> Finding:
    """A single sign is not enough."""
    steps, losses = read_curve(recording, tables.LOSS, "loss")
    checks: tuple[Callable[[Recording], str | None], ...] = (
        _detect_loss_rise,
        _detect_outgrown_weight,
        _detect_update_rms,
        _detect_clipping,
        _detect_divergence,
        _detect_oscillation,
    )
    if len(steps) < LEAST_STEPS:
        return RULE.report_inconclusive(
            "Not enough data on a high learning rate",
            f"the loss of {len(steps)} steps",
            f"at least {LEAST_STEPS} steps with a loss",
        )
    signs = [sign for check in checks if (sign := check(recording))]
    evidence = {"signs": signs, "loss": thin_points(x=steps, y=losses)}
    if len(signs) >= NEEDED:
        ends_over = median_or_nan(losses[-LEAST_STEPS:]) > _starting_loss(recording, losses)
        is_lost = ends_over or _detect_loss_rise(recording) is not None
        return RULE.report_symptom(
            "problem" if is_lost else "warning", "The learning rate is too high", "; ".join(signs), evidence=evidence
        )
    if signs:
        return RULE.report_inconclusive(
            "One sign of a learning rate that is too high",
            signs[0],
            "a run with the same seed at half the rate: its loss is lower if this rate is too high",
            evidence,
        )
    return RULE.report_fine("The learning rate is not too high", "none of the signs", "likely", evidence)


def _detect_loss_rise(recording: Recording) -> str | None:
    """The mean over neighbouring steps is well above the start, or the held-out loss is above the base's."""
    _, losses = read_curve(recording, tables.LOSS, "loss")
    width = max(5, len(losses) // 50)
    means = np.convolve(losses, np.full(width, 1 / width), "valid")
    later = losses[-max(LEAST_STEPS, len(losses) // 2) :]  # as it is compared with the start
    noise = point_noise(later)
    start = _starting_loss(recording, losses)
    if len(means) and means.max() > start + CERTAIN * noise:
        return f"the loss rises to {means.max():.3g} (mean of {width} steps), from {start:.3g} at its start"
    held_out = read_held_out(recording)
    if len(held_out.losses) and held_out.losses[-1] > held_out.start + CERTAIN * point_noise(held_out.losses):
        return (
            f"the loss on the {held_out.what} ends at {held_out.losses[-1]:.3g}, above the base's {held_out.start:.3g}"
        )
    return None


def _starting_loss(recording: Recording, losses: np.ndarray) -> float:
    """A high estimate of the starting loss, so that an easy first batch does not make the rest look like a rise."""
    return float(np.fmax(max(losses[0], median_or_nan(losses[:FIRST])), read_held_out(recording).start))


def _detect_outgrown_weight(recording: Recording) -> str | None:
    _, strength = median_over_modules(update_strength(recording))
    if len(strength) and strength.max() > OUTGROWN:
        return f"dW grows to {strength.max():.3g} times the weight it changes (median over modules)"
    return None


def _detect_update_rms(recording: Recording) -> str | None:
    """Spikes in over 1 % of the steps, or a second moment inflated by a gradient spike while the loss is still high."""
    a, b = (recording.series(tables.OPTIMIZER, f"update_rms_{of}") for of in "ab")
    if not a.names or a.values.shape != b.values.shape:
        return None
    steps, rms = median_over_modules(Series(a.steps, a.names, np.fmax(a.values, b.values)))
    rms = rms[(steps > _find_warmup_end(recording)) & (rms > 0)]  # 0 is no gradient at all, and not a small one
    if not len(rms):
        return None
    spikes = rms > RMS_SPIKE * max(median_or_nan(rms), RMS_STEADY)
    if spikes.sum() >= LEAST_SPIKES and spikes.mean() > 0.01:
        return f"the update RMS is over {RMS_SPIKE:g} times its usual level in {spikes.mean():.0%} of the steps"
    _, losses = read_curve(recording, tables.LOSS, "loss")
    late = median_or_nan(rms[-max(1, len(rms) // 4) :])
    is_loss_high = median_or_nan(losses[-LEAST_STEPS:]) > losses[0] / 4  # gradients also fade when the loss is low
    if late < RMS_STUCK and is_loss_high:
        return f"the update RMS ends at {late:.2g}: Adam still divides by an earlier gradient spike"
    return None


def _detect_oscillation(recording: Recording) -> str | None:
    """dW goes back and forth: it ends nearer to its start than a random walk of as many steps would."""
    straight, steps = measure_straightness(recording), read_curve(recording, tables.LOSS, "loss")[0]
    walk = 1 / np.sqrt(max(1, steps[-1]))
    if not straight < walk:
        return None
    return f"|dW| is {straight:.2g} of the length of its path, where a random walk of {steps[-1]} steps has {walk:.2g}"


def _find_warmup_end(recording: Recording) -> int:
    """The first step with the highest learning rate; 0 if no rate was captured."""
    steps, rates = read_curve(recording, tables.LOSS, "lr")
    return int(steps[rates.argmax()]) if len(steps) else 0


def _detect_clipping(recording: Recording) -> str | None:
    """Clipping alone is no sign: with max_grad_norm=1 a good run may clip every step. Increasing clipping is."""
    steps, clip = read_curve(recording, tables.LOSS, "clip")
    clip = clip[steps > _find_warmup_end(recording)]
    if len(clip) < LEAST_STEPS:
        return None
    share, (early, late) = float((clip < 1).mean()), (median_or_nan(part) for part in np.array_split(clip, 2))
    if share > 0.5 and late < early / 2:
        return f"{share:.0%} of the steps are clipped, to {late:.2g} of the gradient at the end and {early:.2g} before"
    return None


def _detect_divergence(recording: Recording) -> str | None:
    """KL rises in the later half, in which the held-out loss does not improve."""
    _, kl = read_curve(recording, tables.DIVERGENCE, "kl")
    held_out = read_held_out(recording)
    if len(kl) < 4 or held_out.find_direction() != "rises" or held_out.best_index >= len(held_out.losses) // 2:
        return None
    half = median_or_nan(kl[len(kl) // 2 - 1 : len(kl) // 2 + 1])
    if kl[-1] <= CLIMB * half:
        return None
    return f"KL rises from {half:.3g} to {kl[-1]:.3g}, and the held-out loss does not improve"
