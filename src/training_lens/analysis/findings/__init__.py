"""Diagnostic findings of a run: what is wrong, fine or inconclusive, with the numbers behind it. See `diagnose`."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.analysis.findings.diagnosis": ("diagnose",),
        "training_lens.analysis.findings.finding": ("Finding", "Rule"),
        "training_lens.analysis.findings.interventions": ("Intervention", "SettingChange", "read_interventions"),
        "training_lens.analysis.findings.rank": ("RankCheck", "RankLoss", "read_rank_check"),
        "training_lens.analysis.findings.rank_check": ("measure_rank",),
    }
)
