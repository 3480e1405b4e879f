"""`training-lens report`: what the lens saw of a run, as a page, a text or data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from training_lens.cli.common import command
from training_lens.cli.lens import BaseFolder, RunPlace, open_analyzers
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import Analysis

Format = Annotated[Literal["html", "md", "json"], typer.Option("--format", help="html is one file that opens offline.")]
Kind = Annotated[
    Literal["executive", "technical", "diagnostic"],
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
    format: Format = "html",
    kind: Kind = "technical",
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
        analyzer, other = open_analyzers(run, against, options, base)
        from training_lens.analysis.reports.standard import StandardReports

        folder = Path(output) if output else analyzer.recording.folder / "reports"
        folder.mkdir(parents=True, exist_ok=True)
        analysis = analyzer.analyze()
        if other:
            written = _write_comparison(analysis, other.analyze(), folder, format)
        else:
            written = StandardReports(analysis).write(folder, kind, format)
        screen.print_line(f"the report is {written}")
        screen.print_result({"report": str(written), "kind": kind, "format": format})


def _write_comparison(first: Analysis, second: Analysis, folder: Path, format: str) -> Path:
    """Two runs side by side: the dashboard's page of them, or what captures alone give for runs of other trainers."""
    from training_lens.analysis.reports.page_report import write_comparison_page
    from training_lens.analysis.reports.technical import comparison
    from training_lens.runs.run_folder import RunFolder

    runs = [RunFolder(analysis.recording.folder) for analysis in (first, second)]
    if format != "html" or not all((run.metadata / "summary.json").is_file() for run in runs):
        return comparison(first, second).write(folder, format)
    path = folder / "lens-comparison.html"
    write_comparison_page(runs, path)
    return path
