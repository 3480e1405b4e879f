"""`training-lens explain rows`: the life of each training row, and the rows to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_run
from training_lens.cli.options import CommandOptions
from training_lens.cli.truncate_rank import RunArgument

if TYPE_CHECKING:
    from training_lens.analysis.explanations.row_explanation import RowsExplanation
    from training_lens.config.schema import TrainingConfig
    from training_lens.runs.run_folder import RunFolder

Base = Annotated[
    bool,
    typer.Option("--base", help="Also measure every row with the base and with the adapter: two forward passes."),
]
Learned = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="A row counts as learned from this probability per token; else 0.5, if many reach it."
    ),
]
USED = ("output.", *OF_ANY_RUN)
SHOWN = 8  # rows of a list on the screen
WIDEST = 60  # characters of a text on the screen


def explain_rows(
    run: RunArgument = "latest",
    base: Base = False,
    learned: Learned = None,
    *,
    options: CommandOptions,
) -> None:
    """Show the life of each training row: when it was learned, what was forgotten, and which answers may be wrong.

    Reads the losses that the run recorded while it trained; --base measures more.

    Examples: training-lens explain rows; training-lens explain rows RUN --base
    """
    with command(options) as screen:
        if "=" in run and not Path(run).exists():
            _, options = options.split_argument(run)
            run = "latest"
        settings = load_config(options)
        refuse_unused(options.words, USED, "explain rows reads what the run recorded.")
        found = locate_run(run, settings.output, finished=True if base else None)
        explained = _explain(screen, found, base, learned, settings)
        from training_lens.analysis.explanations.rows_report import build_rows_report, rows_table

        build_rows_report(explained).write_all(found.reports, "explain-rows", rows_table(explained))
        screen.print_line(f"saved as {found.reports / 'explain-rows'}.{{json,md,csv,html}}")
        screen.print_result(explained.as_json())


def _explain(
    screen: Screen, run: RunFolder, base: bool, learned: float | None, settings: TrainingConfig
) -> RowsExplanation:
    from training_lens.analysis.explanations import rows_report as report
    from training_lens.analysis.explanations.row_explanation import RowsOptions
    from training_lens.analysis.explanations.row_explanation import explain_rows as explain_recorded_rows
    from training_lens.display.progress import Progress

    device = None if settings.model.device == "auto" else settings.model.device
    asked = RowsOptions(learned, base, device, settings.explicit_values())
    found = explain_recorded_rows(run, asked, Progress(screen.console), screen.print_line)
    for line in report.describe_rows(found):
        screen.print_line(line)
    for name, listed in found.lists.items():
        shown = [[row.id, row.reason, _cut(row.prompt), _cut(row.answer)] for row in listed[:SHOWN]]
        if shown:
            show_table(screen.console, f"{name}: {len(listed):,} rows", ["row", "why", "prompt", "answer"], shown)
    path = run.reports / "explain-rows-suspects.txt"
    path.unlink(missing_ok=True)  # of an earlier call
    if found.suspects:
        report.write_suspects(path, found.suspects)
        screen.print_line(f"the {len(found.suspects)} suspects: {path}; to train without them: data.exclude={path}")
    return found


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"
