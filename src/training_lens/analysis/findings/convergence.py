"""What training on would still gain."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.evidence import thin_points, total_steps
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.held_out import LEAST, HeldOut, measure_scatter, read_held_out
from training_lens.analysis.findings.rank_record import read_rank_check
from training_lens.core.recording import Recording
from training_lens.measures.curves import FitEstimate, remaining_gain

ERRORS = 2.0  # standard errors that a gain may be more or less: 95 % of normal ones
NOISES = 4.0  # a gain that may be 0 and is surely under so many is none to wait for
RULE = Rule(
    code="converged",
    signature="the held-out loss's slope against ln(steps), times the ln(steps) that are left, is under its noise",
    threshold=f"the gain with {ERRORS:g} standard errors under the noise of one held-out loss, or under {NOISES:g} "
    "times that where it may be 0; the noise is a bootstrap error over rows where a rank check measured it, else what "
    "the fitted line leaves over",
    source="relative to this run; a loss is about straight against ln(steps) (LoRA Without Regret, 2025)",
    action="stop here: more steps gain less than can be measured. More or other rows may",
)


def check_convergence(recording: Recording) -> Finding:
    """Whether training on is worth it: to the end of a run that goes on, or of one twice as long."""
    judged = read_held_out(recording)
    if len(judged.steps) < LEAST:
        return RULE.report_inconclusive(
            "What training on would gain is not known",
            f"{len(judged.steps)} losses on held-out rows",
            f"at least {LEAST} of them: give data.validation or data.val_ratio, and training.eval_steps",
        )
    steps, losses = judged.late_half()
    last, running = int(steps[-1]), recording.status == "running"
    end = total_steps(recording) if running else None
    goal = end if end and end > last else 2 * last
    gain, noise = remaining_gain(steps, losses, goal), _loss_noise(recording, steps, losses)
    words = f"training to step {goal}" if running else "a run twice as long"
    measured = (
        f"{words} would change the loss on the {judged.what} by about {-gain.value:+.2g} nats per token (between "
        f"{-gain.value - ERRORS * gain.error:+.2g} and {-gain.value + ERRORS * gain.error:+.2g}); the noise of one "
        f"such loss is {noise:.2g}"
    )
    return _decide(judged, gain, noise, measured, running)


def _decide(judged: HeldOut, gain: FitEstimate, noise: float, measured: str, running: bool) -> Finding:
    evidence = {
        "gain": gain.value,
        "error": gain.error,
        "noise": noise,
        "held_out": thin_points(x=judged.steps, y=judged.losses),
    }
    least, most = gain.value - ERRORS * gain.error, gain.value + ERRORS * gain.error
    if gain.value >= float(judged.losses[-1]):
        return RULE.report_inconclusive(
            "What training on would gain is not known",
            f"the line through the last {LEAST} or more losses on the {judged.what} would lead to 0 or under it, where "
            f"no loss can be (the last is {judged.losses[-1]:.3g}): the curve bends",
            "more validations late in the run (training.eval_steps)",
            evidence,
        )
    if most <= (NOISES * noise if least <= 0 else noise):
        return RULE.report_symptom("note" if running else "fine", "Converged", measured, evidence=evidence)
    if least > 0:
        return RULE.report_symptom(
            "note",
            "The loss still falls",
            measured,
            action="train longer, if that gain is worth it: raise training.epochs or training.max_steps",
            decide="a longer run: this takes for granted that the slope goes on, with a schedule as long as the run",
            evidence=evidence,
        )
    return RULE.report_inconclusive(
        "What training on would gain is within the noise",
        measured,
        "more validations (training.eval_steps), on more rows",
        evidence,
    )


def _loss_noise(recording: Recording, steps: np.ndarray, losses: np.ndarray) -> float:
    """Of one held-out loss, in nats per token."""
    checked = read_rank_check(recording.folder)
    if checked is not None and checked.loss_error is not None:
        return checked.loss_error
    return measure_scatter(steps, losses)
