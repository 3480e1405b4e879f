"""The standard reports of one run."""

from __future__ import annotations

from pathlib import Path

from training_lens.analysis.checkpoint_analyzer import Analysis
from training_lens.analysis.reports.report_files import WRITERS, Report, require_known
from training_lens.utils.files import require_writable

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
        from training_lens.analysis.reports.executive import build_diagnostic

        return build_diagnostic(self.analysis)

    def write(self, folder: Path | str, kind: str = "technical", format: str = "html") -> Path:
        """Write the report of a kind: executive, technical or diagnostic. See `Report.write`.

        As HTML, the technical report is the dashboard's page of the run in one file, below 1 MB.
        """
        require_known({"kind": (kind, KINDS), "format": (format, tuple(WRITERS))})
        if (kind, format) == ("technical", "html"):
            from training_lens.analysis.reports.page_report import write_page_report

            require_writable(Path(folder), "the reports' folder")
            write_page_report(self.analysis, Path(folder) / "lens.html")
            return Path(folder) / "lens.html"
        report: Report = getattr(self, kind)()
        return report.write(folder, format)
