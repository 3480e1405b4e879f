"""`training-lens analyze`: what the lens saw of a run, on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_lens.cli.common import ConfigFile, Debug, Json, Overrides, Screen, command
from training_lens.cli.lens import BaseFolder, RunPlace, opened

if TYPE_CHECKING:
    from training_lens.analysis import Analysis, CheckpointAnalyzer

Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="Compare with a second run: angles between what the two learned.")
]
CheckRank = Annotated[
    bool,
    typer.Option(
        "--check-rank", help="Measure the validation loss at lower ranks (loads the model), and advise a rank_pattern."
    ),
]
MARKS = {"problem": "red", "warning": "yellow", "note": "cyan", "fine": "green"}


def analyze(
    run: RunPlace = "latest",
    overrides: Overrides = None,
    against: Against = None,
    check_rank: CheckRank = False,
    base: BaseFolder = None,
    config: ConfigFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what an adapter did while it trained, and what is wrong, with evidence: finished, running or broken off.

    Examples: training-lens analyze; training-lens analyze RUN --check-rank; training-lens analyze RUN --against RUN2;
    training-lens analyze path/to/trainer_output
    """
    with command(json, debug) as screen:
        analyzer = opened(run, overrides, config, base)
        if check_rank:
            _measure_rank(screen, analyzer)
        analysis = analyzer.analyze()
        _show(screen, analysis)
        values = analysis.values()
        if against:
            values["against"] = _compare(screen, analyzer, opened(against, None, config, base))
        screen.result(values)


def _measure_rank(screen: Screen, analyzer: CheckpointAnalyzer) -> None:
    from training_lens.analysis.findings.rank_check import measure_rank
    from training_lens.utils.runs import RunFolder

    screen.console.print("measuring the validation loss at lower ranks ...", style="dim")
    measure_rank(RunFolder(analyzer.recording.folder))


def _show(screen: Screen, analysis: Analysis) -> None:
    from rich.text import Text

    from training_lens.analysis.reports import three_lines

    console, recording = screen.console, analysis.recording
    console.print(f"[bold]{recording.name}[/] ({recording.status}), {len(recording.modules)} adapted modules")
    for line in three_lines(analysis):
        console.print(Text(f"  {line}"))
    _show_layers(screen, analysis.results.get("weights", {}))
    for finding in analysis.findings:
        mark = "could not tell" if finding.confidence == "could not tell" else finding.severity
        console.print(
            Text.assemble((f"{mark}: ", MARKS[finding.severity]), (finding.title, "bold"), f" {finding.where}")
        )
        for name, text in (("measured", finding.measured), ("do", finding.action)):
            if text:
                console.print(Text(f"    {name}: {text}"))


def _show_layers(screen: Screen, weights: Any) -> None:
    raise NotImplementedError


def _compare(screen: Screen, one: CheckpointAnalyzer, other: CheckpointAnalyzer) -> dict[str, Any]:
    raise NotImplementedError
