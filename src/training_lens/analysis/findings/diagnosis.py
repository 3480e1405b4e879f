"""All findings of a run. To add one, write a file with a rule and a check, and list the check here."""

from __future__ import annotations

from collections.abc import Callable

from training_lens.analysis.advice import translate_finding
from training_lens.analysis.findings.batch_size import check_batch_size
from training_lens.analysis.findings.convergence import check_convergence
from training_lens.analysis.findings.finding import Finding
from training_lens.analysis.findings.forgetting import check_forgetting
from training_lens.analysis.findings.label_noise import check_label_noise
from training_lens.analysis.findings.layer_findings import check_layers
from training_lens.analysis.findings.memorization import check_memorization
from training_lens.analysis.findings.nonfinite import check_nonfinite
from training_lens.analysis.findings.prompt_use import check_prompt_use
from training_lens.analysis.findings.rank import check_rank
from training_lens.analysis.findings.rate_high import check_rate_high
from training_lens.analysis.findings.rate_low import check_rate_low
from training_lens.analysis.findings.self_check import check_gradients
from training_lens.analysis.findings.target_modules import check_target_modules
from training_lens.analysis.findings.untrained import check_untrained
from training_lens.core.recording import Recording
from training_lens.evaluation.verdict import ORDER

CHECKS: tuple[Callable[[Recording], Finding], ...] = (
    check_untrained,
    check_nonfinite,
    check_gradients,
    check_rate_high,  # before its consequences: at equal severity, the first one is reported first
    check_layers,
    check_rate_low,
    check_rank,
    check_batch_size,
    check_target_modules,
    check_memorization,
    check_forgetting,
    check_convergence,
    check_prompt_use,
    check_label_noise,
)


def diagnose(recording: Recording) -> tuple[Finding, ...]:
    """The finding of every check, most severe first, with advice in the words of the loop that trained.

    A check without enough data is inconclusive and says what would decide it.

    Example:
        for finding in diagnose(CheckpointAnalyzer("outputs/.../latest").recording):
            print(finding.severity, finding.title, finding.measured, finding.action)
    """
    found = (translate_finding(check(recording), recording.manifest.origin) for check in CHECKS)
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.severity)))
