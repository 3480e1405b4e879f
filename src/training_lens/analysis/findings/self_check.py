"""Gradients that cannot be those of one loss: of several steps added up, changed, or captured in part."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.evidence import list_names, median_over_modules, read_curve, thin_points
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analyzers.lora_analyzer import SOUND, certify_capture, find_half_frozen, read_residuals
from training_lens.analyzers.module_groups import gradient_norms
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording

FIRST_STEPS = 2  # B is 0 in step 1: both sides of the equation are 0
MOST = 0.5  # of the steps: an error that is always there has a lasting cause
ALIKE = 0.9  # cosine with the previous step's: of fresh gradients it is near 0
RULE = Rule(
    code="self_check",
    signature="gradients of A and B that break B^T dB = dA A^T, which holds for every loss that depends on A and B "
    "through B A alone",
    threshold=f"a residual over {SOUND:g} of the terms; rounding gives at most 1e-7 in float32 and 0.002 in bfloat16",
    source="exact: both sides are s B^T (dL/dW) A^T",
    action="check the loop: zero_grad() after every step, no hook that changes gradients, no loss term on A or B alone",
)


def check_gradients(recording: Recording) -> Finding:
    """Whether the captured gradients are those of one loss at the weights of their step."""
    series = read_residuals(recording)
    found = certify_capture(series)
    if frozen := find_half_frozen(recording):
        return _report_half_frozen(frozen)
    if found["largest"] is None and not np.isinf(series.values).any():
        return RULE.report_inconclusive(
            "Not enough data on whether the gradients are whole",
            "no self-check of a gradient",
            f"captures of the table {tables.GRADIENTS}, of modules with plain LoRA",
        )
    if found["largest"] is not None and found["largest"] <= SOUND:
        measured = f"the largest of {found['checked']:,} residuals is {found['largest']:.1g}"
        return RULE.report_fine("The gradients are those of one loss", measured)
    return _report_broken(recording)


def _report_half_frozen(frozen: dict[str, str]) -> Finding:
    """One factor alone trains: known as a method where it is A that is frozen (LoRA-FA), else hardly intended."""
    still = sorted(set(frozen.values()))
    return RULE.report_symptom(
        "warning" if "B" in still else "note",
        f"{' or '.join(still)} of {len(frozen)} modules gets no gradient",
        f"the other factor of these modules does, so {' or '.join(still)} is frozen or left out of the graph",
        where=list_names(list(frozen)),
        confidence="sure",
        action="let both factors of each module require gradients, unless a frozen A is intended (LoRA-FA, arXiv "
        "2308.03303)",
        evidence={"modules": list(frozen), "frozen": list(frozen.values())},
    )


def _report_broken(recording: Recording) -> Finding:
    series = read_residuals(recording)
    worst = np.nanmax(np.where(np.isnan(series.values), -np.inf, series.values), axis=1)
    late = series.steps > FIRST_STEPS
    broken = worst > SOUND
    share = float(broken[late].mean()) if late.any() else 1.0
    first, module = int(series.steps[broken][0]), series.names[int(np.nanargmax(series.values[broken][0]))]
    measured = f"from step {first}, the residual is over {SOUND:g} in {share:.0%} of the steps (first in {module})"
    evidence = {"step": first, "module": module, "share": share, "residual": thin_points(x=series.steps, y=worst)}
    if share > MOST and (cosine := _measure_repetition(recording)) is not None:
        return RULE.report_symptom(
            "problem",
            "Gradients of earlier steps are added to those of each step",
            f"{measured}; the cosine with the gradient before is {cosine:.3f}, and norms grow",
            confidence="sure",
            action="call optimizer.zero_grad() after every optimizer.step(): the steps so far followed a sum of old "
            "gradients, so start again",
            evidence=evidence,
        )
    return RULE.report_symptom(
        "problem" if share > MOST else "warning",
        "The gradients are not those of one loss",
        measured,
        confidence="sure",
        decide="" if share > MOST else "the steps named: a hook, a skipped step, or a loss of another kind in them",
        evidence=evidence,
    )


def _measure_repetition(recording: Recording) -> float | None:
    """The median cosine with the gradient of the step before, if gradients pile up: near 1, with norms that grow."""
    cosines = median_over_modules(recording.series(tables.GRADIENTS, "cosine_previous"))[1]
    steps, norms = median_over_modules(gradient_norms(recording))
    clip = read_curve(recording, tables.LOSS, "clip")[1]
    if len(cosines) < FIRST_STEPS or float(np.median(cosines)) < ALIKE:
        return None
    early, late = (float(np.median(part)) for part in np.array_split(norms, 2))
    # clipping in place scales the pile down, so its norm need not grow
    grows = late > early or (len(clip) > 0 and bool((clip < 1).any()))
    return float(np.median(cosines)) if len(steps) > FIRST_STEPS and grows else None
