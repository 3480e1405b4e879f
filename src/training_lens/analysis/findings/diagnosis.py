"""All findings of a run. To add one: write its file with a rule and a check, and name the check here."""

from __future__ import annotations

from collections.abc import Callable

from training_lens.analysis.findings.convergence import converged
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.findings.layer_findings import layers
from training_lens.analysis.findings.memorization import memorization
from training_lens.analysis.findings.nonfinite import nonfinite
from training_lens.analysis.findings.rank import rank
from training_lens.analysis.findings.rate_high import rate_high
from training_lens.analysis.findings.rate_low import rate_low
from training_lens.analysis.findings.untrained import untrained
from training_lens.core.recording import Recording

CHECKS: tuple[Callable[[Recording], Finding], ...] = (
    untrained,
    nonfinite,
    rate_high,  # ahead of what it causes: at one severity, the first is told first
    layers,
    rate_low,
    rank,
    memorization,
    converged,
)
ORDER = ("problem", "warning", "note", "fine")


def diagnose(recording: Recording) -> tuple[Finding, ...]:
    """What every check says of a run, the worst first.

    A check whose data are missing says so ("could not tell") and what would decide it.

    Example:
        for finding in diagnose(CheckpointAnalyzer("outputs/.../latest").recording):
            print(finding.severity, finding.title, finding.measured, finding.action)
    """
    return tuple(sorted((check(recording) for check in CHECKS), key=lambda found: ORDER.index(found.severity)))
