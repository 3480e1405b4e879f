"""`training-lens analyze`: what the lens saw of a run, on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import degrees, isnan
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from training_lens.cli.common import Screen, command, show_table
from training_lens.cli.lens import BaseFolder, RunPlace, open_analyzers
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import AdapterComparison, Analysis
    from training_lens.analysis.findings import Finding

Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="Compare with a second run: angles between what the two learned.")
]
MOST_ROWS = 12  # of a table on the screen
MARKS = {"problem": "red", "warning": "yellow", "note": "cyan", "fine": "green"}
MEANING = (
    "dW is what the adapter adds to a weight W; share: of the sum of |dW|² over all modules. The others are medians "
    "over a layer's modules: strength, |dW| / |W|; effective rank, how many directions dW uses; 90 % rank, how many of "
    "them hold 90 % of |dW|²."
)
ALIKE = (
    "cosine of dW: 1 is the same update, 0 an unrelated one; angles are between what the two updates write: 0° is the "
    "same directions, 90° none shared."
)


def analyze(
    run: RunPlace = "latest",
    *,
    against: Against = None,
    base: BaseFolder = None,
    options: CommandOptions,
) -> None:
    """Say what an adapter did while it trained, and what is wrong, with evidence: finished, running or broken off.

    Examples: training-lens analyze; training-lens analyze RUN --against RUN2;
    training-lens analyze path/to/trainer_output
    """
    with command(options) as screen:
        analyzer, other = open_analyzers(run, against, options, base)
        comparison = analyzer.compare(other) if other else None
        analysis = analyzer.analyze()
        _show_analysis(screen, analysis)
        values = analysis.values()
        if comparison:
            _show_likeness(screen, comparison)
            values["against"] = comparison.values()
        screen.print_result(values)


def _show_analysis(screen: Screen, analysis: Analysis) -> None:
    from training_lens.analysis.reports.executive import three_lines

    console, recording = screen.console, analysis.recording
    console.print(Text.assemble((recording.name, "bold"), f" ({recording.status})"))
    for line in three_lines(analysis):
        console.print(Text(f"  {line}"))
    _show_layers(screen, analysis.results.get("weights", {}))
    console.print("\nfindings", style="bold")
    for finding in analysis.findings:
        _show_finding(screen, finding)


def _show_finding(screen: Screen, finding: Finding) -> None:
    mark = finding.confidence if finding.confidence == "inconclusive" else finding.severity
    where = f" ({finding.where})" if finding.where else ""
    screen.console.print(Text.assemble((f"{mark}: ", MARKS[finding.severity]), (finding.title, "bold"), where))
    wrong = finding.severity in ("problem", "warning")
    rest = {
        "measured": finding.measured,
        "threshold": f"{finding.threshold} ({finding.source})" if wrong else "",
        "do": finding.action,
        "would decide": finding.decide,
    }
    for name, text in rest.items() if finding.severity != "fine" else ():
        if text:
            screen.console.print(Text(f"    {name}: {text}"))


def _show_layers(screen: Screen, weights: Mapping[str, Any]) -> None:
    """Print the layers with the largest shares of the update, in their order."""
    shares = {layer: share for layer, share in weights.get("share_by_layer", {}).items() if share is not None}
    largest = sorted(shares, key=lambda layer: -shares[layer])[:MOST_ROWS]
    if not largest:
        return
    left_out = f"; the {MOST_ROWS} largest of {len(shares)}" if len(shares) > MOST_ROWS else ""
    columns, rows = ("layer", "share of the update", "strength", "effective rank", "90 % rank"), []
    for layer in (layer for layer in shares if layer in largest):
        number = None if layer == "outside" else int(layer)
        modules = [m for m in weights["modules"] if m["layer"] == number]
        forms = {"strength": "{:.2%}", "effective_rank": "{:.3g}", "energy_rank": "{:.3g}"}
        typical = [_format_median(modules, measure, form) for measure, form in forms.items()]
        rows.append([str(layer), f"{shares[layer]:.1%}", *typical])
    show_table(screen.console, f"what changed, by layer{left_out}", columns, rows, right=columns)
    screen.console.print(MEANING)


def _format_median(modules: Sequence[Mapping[str, Any]], measure: str, form: str) -> str:
    known = [module[measure] for module in modules if module[measure] is not None]
    return form.format(median(known)) if known else "-"


def _show_likeness(screen: Screen, comparison: AdapterComparison) -> None:
    """Print the modules in which two runs differ most, and the median over all modules."""
    modules, middle = comparison.modules, comparison.values()["median_cosine"]
    known = {name: alike for name, alike in modules.items() if not isnan(alike.cosine)}
    least = sorted(known, key=lambda name: known[name].cosine)[:MOST_ROWS]
    left_out = f"; the {MOST_ROWS} least alike of {len(modules)} modules" if len(modules) > len(least) else ""
    rows, numbers = [], ("cosine of dW", "angles")
    for name in least:
        angles = [f"{degrees(angle):.0f}°" for angle in known[name].columns]
        rows.append((name, f"{known[name].cosine:.3f}", " to ".join(dict.fromkeys(angles[:1] + angles[-1:]))))
    title = f"{' and '.join(comparison.names)}{left_out}"
    show_table(screen.console, title, ("module", *numbers), rows, right=numbers)
    if middle is not None:
        screen.console.print(f"median cosine over {len(modules)} modules: {middle:.3f}")
    screen.console.print(ALIKE)
    if alone := [*comparison.only_first, *comparison.only_second]:
        screen.print_line(f"adapted in one of the two alone: {', '.join(alone)}")
