"""`training-lens analyze`: what the lens saw of a run, on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from math import degrees
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_lens.cli.common import ConfigFile, Debug, Json, Overrides, Screen, command
from training_lens.cli.lens import BaseFolder, RunPlace, opened

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import Analysis, CheckpointAnalyzer

Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="Compare with a second run: angles between what the two learned.")
]
CheckRank = Annotated[
    bool,
    typer.Option(
        "--check-rank", help="Measure the validation loss at lower ranks (loads the model), and advise a rank_pattern."
    ),
]
MOST_LAYERS = 12  # on the screen
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
    from training_lens.analysis.findings import measure_rank
    from training_lens.errors import LensError
    from training_lens.utils.progress import Progress
    from training_lens.utils.runs import RunFolder

    run = RunFolder(analyzer.recording.folder)
    if not run.metadata.is_dir():
        raise LensError(
            f"--check-rank measures the loss of a run of training-lens train on its validation rows; {run.root} is "
            "none. Leave --check-rank out."
        )
    check = measure_rank(run, progress=Progress(screen.console))
    at = check.at_energy_ranks
    told = f"validation loss {check.loss:.4f} at full rank, {at.delta:+.4f} with each module cut to its 90 % rank"
    screen.console.print(f"{told} ({check.rows} rows)", markup=False)
    if check.rank_pattern:
        pattern = ", ".join(f"{name}: {rank}" for name, rank in check.rank_pattern.items())
        screen.console.print(f"peft.rank_pattern={{{pattern}}}", markup=False, soft_wrap=True)


def _show(screen: Screen, analysis: Analysis) -> None:
    from rich.text import Text

    from training_lens.analysis.reports.executive import three_lines

    console, recording = screen.console, analysis.recording
    console.print(Text.assemble((recording.name, "bold"), f" ({recording.status})"))
    for line in three_lines(analysis):
        console.print(Text(f"  {line}"))
    _show_layers(screen, analysis.results.get("weights", {}))
    console.print("\n[bold]findings[/]")
    for finding in analysis.findings:
        mark = finding.confidence if finding.confidence == "could not tell" else finding.severity
        where = f" ({finding.where})" if finding.where else ""
        console.print(Text.assemble((f"{mark}: ", MARKS[finding.severity]), (finding.title, "bold"), where))
        rest = {"measured": finding.measured, "do": finding.action, "would decide": finding.decide}
        for name, text in rest.items() if finding.severity != "fine" else ():
            if text:
                console.print(Text(f"    {name}: {text}"))


def _show_layers(screen: Screen, weights: Mapping[str, Any]) -> None:
    """The layers that carry most of the update, in their order."""
    from statistics import median

    from rich.table import Table

    shares = {layer: share for layer, share in weights.get("share_by_layer", {}).items() if share is not None}
    largest = sorted(shares, key=lambda layer: -shares[layer])[:MOST_LAYERS]
    if not largest:
        return
    left_out = f"; the {MOST_LAYERS} largest of {len(shares)}" if len(shares) > MOST_LAYERS else ""
    table = Table(title=f"what changed, by layer{left_out}", title_justify="left")
    for column in ("layer", "share of the update", "strength", "effective rank", "90 % rank"):
        table.add_column(column, justify="right")
    for layer in (layer for layer in shares if layer in largest):
        number = None if layer == "outside" else int(layer)
        modules = [m for m in weights["modules"] if m["layer"] == number]
        columns = {
            name: [m[name] for m in modules if m[name] is not None]
            for name in ("strength", "effective_rank", "energy_rank")
        }
        typical = [f"{median(values):.3g}" if values else "-" for values in columns.values()]
        table.add_row(str(layer), f"{shares[layer]:.1%}", *typical)
    screen.console.print(table)


def _compare(screen: Screen, one: CheckpointAnalyzer, other: CheckpointAnalyzer) -> dict[str, Any]:
    from rich.table import Table
    from rich.text import Text

    comparison = one.compare(other)
    values = comparison.values()
    table = Table(title=f"{values['runs'][0]} and {values['runs'][1]}", title_justify="left")
    for column in ("module", "cosine of dW", "smallest angle", "largest angle"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for name, alike in comparison.modules.items():
        angles = [f"{degrees(angle):.0f}°" for angle in (*alike.columns[:1], *alike.columns[-1:])] or ["-", "-"]
        table.add_row(Text(name), f"{alike.cosine:.3f}", *angles)
    screen.console.print(table)
    screen.console.print("angles are between what the two updates write; 0° is the same directions, 90° none shared")
    return values
