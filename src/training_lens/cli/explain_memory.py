"""`training-lens explain memory`: what an adapter can say of the rows that it was trained on."""

from __future__ import annotations

from typing import Annotated

import typer

from training_lens.cli.common import OF_ANY_RUN, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_run, refuse_adapter_folder
from training_lens.cli.options import CommandOptions
from training_lens.cli.truncate_rank import RunArgument

Rows = Annotated[
    list[str] | None, typer.Option("--row", metavar="ID", help="A training row to look at, FILE:NUMBER; repeatable.")
]
Candidates = Annotated[
    int, typer.Option(metavar="N", help="Candidates among which a row is ranked; it is one of them.")
]
Samples = Annotated[int, typer.Option(metavar="N", help="Training rows, and as many validation rows, to continue.")]
USED = ("output.", *OF_ANY_RUN)
SHOWN = 12  # rows on the screen


def explain_memory(
    run: RunArgument = "latest",
    row: Rows = None,
    candidates: Candidates = 1024,
    samples: Samples = 64,
    *,
    options: CommandOptions,
) -> None:
    """Measure what an adapter remembers: the exposure of canaries and chosen rows, and exact continuations.

    Canaries are made-up rows that data.canaries plants in training. A low number is no proof of privacy.

    Examples: training-lens explain memory; training-lens explain memory RUN --row rows.jsonl:17
    """
    with command(options) as screen:
        run, options = options.split_run(run)
        refuse_adapter_folder(run, "explain memory needs to know the rows that it was trained on")
        settings = load_config(options)
        refuse_unused(options.words, USED, "explain memory measures with the run's own config.")
        found = locate_run(run, settings.output, finished=True)
        found.require_adapter()
        from training_lens.analysis.explanations import memory_report as report
        from training_lens.analysis.explanations.memory_measurement import MemoryOptions, explain_memory
        from training_lens.display.progress import Progress

        asked = MemoryOptions(
            candidates, samples, tuple(row or ()), settings.model.chosen_device, settings.explicit_values()
        )
        measured = explain_memory(found, asked, Progress(screen.console), screen.print_line)
        exposures, continued = report.exposure_table(measured), report.continuation_table(measured)
        for table in (exposures, continued):
            if table.rows:
                show_table(screen.console, table.caption, table.columns[:6], [r[:6] for r in table.rows[:SHOWN]])
        for line in (*report.describe_memory(measured), *measured.notes):
            screen.print_line(line)
        csv = exposures if exposures.rows else continued
        report.build_memory_report(measured).write_all(found.reports, "explain-memory", csv)
        screen.print_line(f"saved as {found.reports / 'explain-memory'}.{{json,md,csv,html}}")
        screen.print_result(measured.as_json())
