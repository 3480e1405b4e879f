"""Whether more training would still gain: what the held-out losses show, and where they do not tell."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from training_lens.analysis.findings.evidence import (
    LEAST,
    HeldOut,
    measure_scatter,
    read_held_out,
    thin_points,
)
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.interventions import Claim, decide_finding, read_interventions
from training_lens.analysis.findings.rank import read_rank_check
from training_lens.analyzers.convergence_analyzer import STEADY_RATE, measure_late_rate
from training_lens.core.recording import Recording
from training_lens.display.html import Severity
from training_lens.measures.curves import MEASURED_LAW, LossForecast, forecast_loss, remaining_gain

ERRORS = 2.0  # standard errors on each side of a gain: a 95 % interval
NOISES = 4.0  # a gain that may be 0 and is surely below this many noises is not worth waiting for
RULE = Rule(
    code="converged",
    signature="the held-out loss rises, or is flat while the learning rate stays at its peak; a curve under a falling "
    "rate flattens by itself and is not extended",
    threshold=f"at a rate above {STEADY_RATE:g} of its peak in the later half: the gain of twice the steps at the "
    f"slope against ln(steps), plus {ERRORS:g} standard errors, below the noise of one held-out loss, or below "
    f"{NOISES:g} times that noise if the gain may be 0; the noise is the bootstrap error over rows if a "
    "rank check measured it, else the residual of the fitted line",
    source="relative to this run; losses at a constant rate are about linear in ln(steps) (LoRA Without Regret, 2025)",
    action="stop here: more steps would gain less than can be measured. More or different rows may help",
)
CLAIM = Claim(
    question="epoch",
    change="continued",
    better="One more epoch lowers the loss",
    open="The gain from one more epoch is unknown",
    fine="Converged",
    action="train on from this adapter: {setting}",
    trusts_short_gain=True,
    trusts_short_loss=False,  # a part of an epoch gains less than the whole
    severity="note",
)


def check_convergence(recording: Recording) -> Finding:
    """Whether more training is worth it: by an epoch that was added, or else by the held-out losses."""
    return decide_finding(RULE, _check_curve(recording), read_interventions(recording.folder), CLAIM)


def _check_curve(recording: Recording) -> Finding:
    held_out = read_held_out(recording)
    if len(held_out.steps) < LEAST:
        return RULE.report_inconclusive(
            "The gain from more training is unknown",
            f"{len(held_out.steps)} held-out losses",
            f"at least {LEAST} held-out losses: set data.validation or data.val_ratio, and training.eval_steps",
        )
    direction, (steps, losses) = held_out.find_direction(), held_out.late_half()
    rate = measure_late_rate(recording, int(steps[0]))
    evidence = {"direction": direction, "held_out": thin_points(x=held_out.steps, y=held_out.losses)}
    verb = {"falls": "falls", "rises": "rises"}.get(direction, "neither falls nor rises for sure")
    measured = (
        f"the loss on the {held_out.what} {verb} from step {steps[0]} to {steps[-1]} ({losses[0]:.4g} to "
        f"{losses[-1]:.4g}) at "
        + ("an unknown rate" if np.isnan(rate) else f"a learning rate that is {rate:.0%} of its peak at the lowest")
    )
    severity: Severity = "note" if recording.status == "running" else "fine"
    if direction == "rises":
        action = "stop here, and use the checkpoint with the best held-out loss"
        title = "The held-out loss no longer falls"
        return RULE.report_symptom(severity, title, measured, action=action, evidence=evidence)
    if rate >= STEADY_RATE and _is_flat(held_out, recording):
        return RULE.report_symptom(severity, "Converged", measured, evidence=evidence)
    found = _forecast_twice(recording, held_out)
    if found is not None:
        measured, evidence = f"{measured}; {describe_forecast(found)}", {**evidence, "forecast": asdict(found)}
    return RULE.report_inconclusive(
        "The gain from more training is unknown",
        measured,
        "a new run of twice the steps, with a schedule over its own length",
        evidence,
    )


def _forecast_twice(recording: Recording, held_out: HeldOut) -> LossForecast | None:
    """The forecast of a run that took its schedule to the end, as the pairs of the law did."""
    is_whole = held_out.steps[-1] >= int(recording.settings.get("total_steps") or 0)
    if recording.status != "finished" or not is_whole or np.isnan(held_out.start):
        return None
    return forecast_loss(MEASURED_LAW, held_out.steps, held_out.losses, held_out.start)


def describe_forecast(found: LossForecast) -> str:
    """The interval of a forecast, and what it stands on."""
    return (
        f"a run of twice the steps would change its best by {found.low:+.3g} to {found.high:+.3g} "
        f"({found.confidence:.0%} interval, from {found.pairs} pairs of small runs that were trained at both lengths)"
    )


def _is_flat(held_out: HeldOut, recording: Recording) -> bool:
    """Whether the gain of as many steps again, at the present slope, is surely too small to wait for."""
    steps, losses = held_out.late_half()
    checked = read_rank_check(recording.folder)
    by_rows = checked.loss_error if checked is not None else None
    noise = measure_scatter(steps, losses) if by_rows is None else by_rows
    gain = remaining_gain(steps, losses, 2 * int(steps[-1]))
    least, most = gain.value - ERRORS * gain.error, gain.value + ERRORS * gain.error
    return most <= (NOISES * noise if least <= 0 else noise)
