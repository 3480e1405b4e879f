"""The gain that more training would still bring."""

from __future__ import annotations

from training_lens.analysis.findings.evidence import LEAST, HeldOut, measure_scatter, read_held_out, thin_points
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.interventions import Claim, decide_finding, read_interventions
from training_lens.analysis.findings.rank import read_rank_check
from training_lens.core.recording import Recording
from training_lens.measures.curves import FitEstimate, remaining_gain

ERRORS = 2.0  # standard errors on each side of a gain: a 95 % interval
NOISES = 4.0  # a gain that may be 0 and is surely below this many noises is not worth waiting for
RULE = Rule(
    code="converged",
    signature="the slope of the held-out loss against ln(steps), extended over the remaining steps, is below the noise",
    threshold=f"a gain plus {ERRORS:g} standard errors below the noise of one held-out loss, or below {NOISES:g} times "
    "that noise if the gain may be 0; the noise is the bootstrap error over rows if a rank check measured it, else the "
    "residual of the fitted line",
    source="relative to this run; losses are about linear in ln(steps) (LoRA Without Regret, 2025)",
    action="stop here: more steps would gain less than can be measured. More or different rows may help",
)


CLAIM = Claim(
    question="epoch",
    change="continued",
    better="One more epoch lowers the loss",
    open="The gain from one more epoch is within the noise",
    fine="Converged",
    action="train on from this adapter: {setting}",
    trusts_short_gain=True,
    trusts_short_loss=True,
    severity="note",
)


def check_convergence(recording: Recording) -> Finding:
    """Whether more training is worth it: by an epoch that was added, or else by the held-out losses."""
    return decide_finding(RULE, _check_curve(recording), read_interventions(recording.folder), CLAIM)


def _check_curve(recording: Recording) -> Finding:
    """To the planned end of a running run, or for twice as many steps."""
    held_out = read_held_out(recording)
    if len(held_out.steps) < LEAST:
        return RULE.report_inconclusive(
            "The gain from more training is unknown",
            f"{len(held_out.steps)} held-out losses",
            f"at least {LEAST} held-out losses: set data.validation or data.val_ratio, and training.eval_steps",
        )
    steps, losses = held_out.late_half()
    last, running = int(steps[-1]), recording.status == "running"
    end = int(recording.settings.get("total_steps") or 0) if running else 0
    goal = end if end > last else 2 * last
    checked = read_rank_check(recording.folder)
    by_rows = checked.loss_error if checked is not None else None
    gain, noise = remaining_gain(steps, losses, goal), measure_scatter(steps, losses) if by_rows is None else by_rows
    words = f"training to step {goal}" if running else "a run twice as long"
    measured = (
        f"{words} would change the loss on the {held_out.what} by about {-gain.value:+.2g} nats per token (between "
        f"{-gain.value - ERRORS * gain.error:+.2g} and {-gain.value + ERRORS * gain.error:+.2g}); the noise of one "
        f"such loss is {noise:.2g}"
    )
    return _decide(held_out, gain, noise, measured, running)


def _decide(held_out: HeldOut, gain: FitEstimate, noise: float, measured: str, running: bool) -> Finding:
    evidence = {
        "gain": gain.value,
        "error": gain.error,
        "noise": noise,
        "held_out": thin_points(x=held_out.steps, y=held_out.losses),
    }
    least, most = gain.value - ERRORS * gain.error, gain.value + ERRORS * gain.error
    if gain.value >= float(held_out.losses[-1]):
        return RULE.report_inconclusive(
            "The gain from more training is unknown",
            f"extending the line through the later losses on the {held_out.what} predicts a loss of 0 or less, which "
            f"is impossible (the last is {held_out.losses[-1]:.3g}): the curve flattens",
            "more validations late in the run (training.eval_steps)",
            evidence,
        )
    if most <= (NOISES * noise if least <= 0 else noise):
        return RULE.report_symptom("note" if running else "fine", "Converged", measured, evidence=evidence)
    if least > 0:
        return RULE.report_symptom(
            "note",
            "The loss is still falling",
            measured,
            action="train longer if that gain is worth it: raise training.epochs or training.max_steps",
            decide="a longer run: this assumes that the slope continues, with a schedule as long as the run",
            evidence=evidence,
        )
    return RULE.report_inconclusive(
        "The gain from more training is within the noise",
        measured,
        "more validations (training.eval_steps), on more rows",
        evidence,
    )
