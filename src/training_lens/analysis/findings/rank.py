"""A rank that is larger than needed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.analysis.findings.rank_record import TOLERANCE, RankCheck, read_rank_check
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording

FAR_UNDER = 0.25  # energy rank over rank
MOST = 0.5  # of the modules
RULE = Rule(
    code="rank",
    signature="few directions hold 90 % of |dW|^2 in most modules, and truncating to them does not change the "
    "validation loss",
    threshold=f"at most {FAR_UNDER:g} r directions in over {MOST:.0%} of the modules, and a loss increase below "
    f"{TOLERANCE:.0%} of the adapter's gain over the base (upper end of the 95 % interval)",
    source="LoRA paper, section 7 (arXiv 2106.09685); the loss is measured on this run's validation rows",
    action="train with a lower peft.r or this peft.rank_pattern: fewer parameters at the same expected loss",
)


class _RankUse(NamedTuple):
    """At one step: how many of the changed modules use few directions, and the median share of r that they use."""

    step: int
    low: int
    known: int
    share: float


def check_rank(recording: Recording) -> Finding:
    """Whether a smaller rank is enough. The spectrum alone is no proof: weak directions may matter for the loss."""
    used = _measure_rank_use(recording)
    if used is None:
        return RULE.report_inconclusive(
            "Not enough data on the rank",
            "no spectra of a changed weight",
            f"captures of the table {tables.SPECTRA}",
        )
    measured = (
        f"{used.low} of {used.known} modules hold 90 % of |dW|^2 in at most {FAR_UNDER:g} r directions at step "
        f"{used.step} (median {used.share:.2g} r)"
    )
    evidence: dict[str, object] = {"low": used.low, "modules": used.known, "median_share": used.share}
    if used.low <= MOST * used.known:
        return RULE.report_fine("The rank is used", measured, evidence=evidence)
    check = read_rank_check(recording.folder)
    if check is None or check.step < used.step:
        old = "" if check is None else f"; the rank check was made at step {check.step}"
        decide = "training-lens analyze RUN --check-rank, which measures the loss at smaller ranks"
        return RULE.report_inconclusive("The rank may be larger than needed", measured + old, decide, evidence)
    return _report_check(check, measured, evidence)


def _measure_rank_use(recording: Recording) -> _RankUse | None:
    """At the last step whose spectra show a change."""
    series = recording.series(tables.SPECTRA, "energy_rank")
    ranks = {module.name: module.rank for module in recording.modules}
    columns = [i for i, name in enumerate(series.names) if name in ranks]
    shares = series.values[:, columns] / np.array([ranks[series.names[i]] for i in columns], float)
    there = np.isfinite(shares) & (shares > 0)
    if not there.any():
        return None
    at = int(np.flatnonzero(there.any(1))[-1])
    known = shares[at][there[at]]
    return _RankUse(int(series.steps[at]), int((known <= FAR_UNDER).sum()), len(known), float(np.median(known)))


def _report_check(check: RankCheck, spectrum: str, evidence: dict[str, object]) -> Finding:
    at = check.at_energy_ranks
    interval = "unknown" if at.low is None or at.high is None else f"{at.low:.3g} to {at.high:.3g}"
    text = (
        f"{spectrum}; truncated to these, the loss on {check.rows} rows changes by {at.delta:+.3g} nats ({interval}), "
        f"where the adapter gains {check.gain:.3g}"
    )
    evidence |= {"delta": at.delta, "gain": check.gain, "rank_pattern": dict(check.rank_pattern)}
    evidence |= {"ranks": [a.rank for a in check.at_fixed_ranks], "deltas": [a.delta for a in check.at_fixed_ranks]}
    if at.high is None or check.gain <= 0:
        return RULE.report_inconclusive(
            "The rank may be larger than needed",
            text,
            "an adapter that improves on the base, and at least two validation rows",
            evidence,
        )
    if check.is_unchanged(at):
        pattern = ", ".join(f"{name}: {k}" for name, k in check.rank_pattern.items())
        return RULE.report_symptom(
            "note",
            "A smaller rank is enough",
            text,
            action=f"{RULE.action}: '{{{pattern}}}'",
            decide="a run with this pattern: truncating after training is not training at that rank",
            evidence=evidence,
        )
    smallest = check.smallest_unchanged
    also = f"; rank {smallest} in all modules does not change it" if smallest else ""
    return RULE.report_fine("The weak directions of dW matter for the loss", text + also, "likely", evidence)
