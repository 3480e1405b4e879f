"""The standard reports of one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from training_lens.analysis.reports.report_document import Report, ReportFormat
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import Analysis

KINDS = ("executive", "technical", "diagnostic")


class StandardReports:
    """Three reports of one analysis.

    executive: a one-screen summary; technical: all tables and figures; diagnostic: each finding with evidence,
    threshold, source, confidence and action.

    Example:
        analysis = CheckpointAnalyzer("outputs/experiments/default/runs/20261120T203605Z-5f3a").analyze()
        StandardReports(analysis).write("reports", "technical")  # reports/lens.html
        print(StandardReports(analysis).executive().markdown())
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis

    def executive(self) -> Report:
        """A one-screen summary: learning, next steps, problems, changed layers, capture quality."""
        from training_lens.analysis.reports.executive import build_executive

        return build_executive(self.analysis)

    def technical(self) -> Report:
        """All tables and figures, and the results of the user's own analyzers."""
        from training_lens.analysis.reports.technical import build_technical

        return build_technical(self.analysis)

    def diagnostic(self) -> Report:
        """Each finding in full."""
        from training_lens.analysis.reports.diagnostic import build_diagnostic

        return build_diagnostic(self.analysis)

    def write(self, folder: Path | str, kind: str = "technical", format: str = "html") -> Path:
        """Write one report into `folder`, technical as lens.html and others as lens-KIND.html; returns its path.

        Args:
            kind: executive, technical or diagnostic.
            format: html, md or json.

        Raises:
            ConfigurationError: the kind or format is unknown.
        """
        allowed = {"kind": (kind, KINDS), "format": (format, get_args(ReportFormat))}
        problems = [
            f"{key}: '{given}' is given; there are: {', '.join(known)}."
            for key, (given, known) in allowed.items()
            if given not in known
        ]
        if problems:
            raise ConfigurationError(problems)
        report: Report = getattr(self, kind)()
        return report.write(folder, format)
