"""Reports of a run (summary, technical, diagnostic) and of two runs side by side, as HTML, Markdown and JSON."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.analysis.reports.comparison_report": ("comparison",),
        "training_lens.analysis.reports.executive": ("three_lines",),
        "training_lens.analysis.reports.standard": ("KINDS", "Report", "StandardReports"),
    }
)
