"""`training-lens report`: what the lens saw of a run, as a page, a text or data."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from training_lens.cli.common import command
from training_lens.cli.lens import BaseFolder, RunPlace, open_analyzers
from training_lens.cli.options import CommandOptions


class ReportFormat(StrEnum):
    """How a report is written."""

    html = "html"
    md = "md"
    json = "json"


class ReportKind(StrEnum):
    """Which report: one screen in plain words, all of it, or what is wrong with the evidence."""

    executive = "executive"
    technical = "technical"
    diagnostic = "diagnostic"


FormatOption = Annotated[ReportFormat, typer.Option("--format", help="html is one file that opens offline.")]
KindOption = Annotated[
    ReportKind,
    typer.Option(help="executive: one screen in plain words; technical: all; diagnostic: findings with evidence."),
]
Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="Put a second run beside it: the same pictures, on the same scales.")
]
Output = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Where it is written; without it, reports/ of the run.")
]


def report(
    run: RunPlace = "latest",
    *,
    format: FormatOption = ReportFormat.html,
    kind: KindOption = ReportKind.technical,
    against: Against = None,
    base: BaseFolder = None,
    output: Output = None,
    options: CommandOptions,
) -> None:
    """Write a report of what the lens captured: of a run (finished, running or broken off) or of PEFT checkpoints.

    Examples: training-lens report; training-lens report RUN --kind diagnostic --format md;
    training-lens report RUN --against OTHER_RUN; training-lens report path/to/trainer_output
    """
    with command(options) as screen:
        from pathlib import Path

        analyzer, other = open_analyzers(run, against, options, base)
        from training_lens.analysis.reports.standard import StandardReports

        folder = Path(output) if output else analyzer.recording.folder / "reports"
        folder.mkdir(parents=True, exist_ok=True)
        analysis = analyzer.analyze()
        if other:
            from training_lens.analysis.reports.comparison_report import comparison

            beside = comparison(analysis, other.analyze())
            written = beside.write(folder, format.value)
        else:
            written = StandardReports(analysis).write(folder, kind.value, format.value)
        screen.print_line(f"the report is {written}")
        screen.print_result({"report": str(written), "kind": kind.value, "format": format.value})
