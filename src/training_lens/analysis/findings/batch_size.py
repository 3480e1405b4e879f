"""A batch far above the gradient noise scale: more examples in a step than its direction needs."""

from __future__ import annotations

import numpy as np

from training_lens.analysis.findings.evidence import read_curve
from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analyzers.module_groups import gradient_norms
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording

LEAST_STEPS = 12
FAR_ABOVE = 10.0  # batch over noise scale
RULE = Rule(
    code="batch_large",
    signature="gradients of neighbouring steps, whose examples differ, point the same way: the batch averages nearly "
    "all noise away",
    threshold=f"a batch over {FAR_ABOVE:g} times the gradient noise scale, in the median of the run after its warm-up",
    source="the simple noise scale of McCandlish et al. (arXiv 1812.06162), tr(S) / |G|^2; two independent gradients "
    "of B examples have the cosine 1 / (1 + noise scale / B) on average",
    action="a smaller training.batch_size with more steps: it learns more from the same number of examples",
)


def check_batch_size(recording: Recording) -> Finding:
    """Whether the batch is far above the gradient noise scale, by the cosine of neighbouring steps' gradients."""
    cosines = _measure_cosines(recording)
    if len(cosines) < LEAST_STEPS:
        return RULE.report_inconclusive(
            "Not enough data on the batch size",
            f"the cosine of neighbouring gradients at {len(cosines)} steps",
            f"at least {LEAST_STEPS} captured steps after the warm-up (lens.scalars_every=1)",
        )
    cosine = float(np.median(cosines))
    if cosine <= 0:
        return RULE.report_fine("The batch is not above the noise scale", f"a cosine of {cosine:.2f}", "likely")
    ratio = cosine / max(1 - cosine, 1e-6)
    measured = f"neighbouring gradients have a cosine of {cosine:.2f}: the batch is {ratio:.2g} times the noise scale"
    evidence = {"cosine": cosine, "ratio": ratio}
    if ratio <= FAR_ABOVE:
        return RULE.report_fine("The batch is not far above the noise scale", measured, "likely", evidence)
    return RULE.report_symptom(
        "note",
        "The batch is far above the gradient noise scale",
        measured,
        decide="a run with a quarter of the batch and the same number of examples: its loss is as low or lower",
        evidence=evidence,
    )


def _measure_cosines(recording: Recording) -> np.ndarray:
    """(steps,): the cosine of the whole gradient with that of the step before, after the warm-up."""
    series, norms = recording.series(tables.GRADIENTS, "cosine_previous"), gradient_norms(recording)
    if series.names != norms.names:
        return np.zeros(0)
    shared = np.intersect1d(series.steps, norms.steps)
    cosines, sizes = (each.values[np.isin(each.steps, shared)] for each in (series, norms))
    weights = sizes[1:] * sizes[:-1]  # (steps, modules): the inner product's share of each module
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = np.nansum(cosines[1:] * weights, 1) / np.sqrt((sizes[1:] ** 2).sum(1) * (sizes[:-1] ** 2).sum(1))
    steps, rates = read_curve(recording, tables.LOSS, "lr")
    warm = int(steps[rates.argmax()]) if len(steps) else 1
    return np.asarray(whole[(shared[1:] > max(1, warm)) & np.isfinite(whole)])
