"""`training-lens benchmark`: how fast base, adapter and merged model of a run answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training_lens.cli.common import (
    OF_ANY_RUN,
    FinishedRun,
    Screen,
    command,
    load_config,
    refuse_unused,
    show_table,
)
from training_lens.cli.evaluation_output import send_to_trackers
from training_lens.cli.find_runs import locate_run
from training_lens.cli.options import CommandOptions

if TYPE_CHECKING:
    from training_lens.inference.benchmark_run import Benchmark


def benchmark(run: FinishedRun = "latest", *, options: CommandOptions) -> None:
    """Measure how fast base, adapter and merged model answer: time to first token, per token, latency, memory."""
    with command(options) as screen:
        settings = load_config(options)
        used = ("benchmark.", "output.", *OF_ANY_RUN)
        refuse_unused(options.words, used, "benchmark measures with the run's own config.")
        found = locate_run(run, settings.output, finished=True)
        found.require_adapter()
        from training_lens.display.progress import Progress
        from training_lens.inference.benchmark_page import write_benchmark_page
        from training_lens.inference.benchmark_run import run_benchmark
        from training_lens.inference.session import open_run
        from training_lens.utils.files import write_json

        session = open_run(found, settings.model.chosen_device, given=settings.explicit_values())
        report = run_benchmark(session, settings.benchmark, Progress(screen.console))
        write_json(found.reports / "benchmark.json", report.as_json())
        write_benchmark_page(found.reports / "benchmark.html", report)
        show_benchmark(screen, report)
        send_to_trackers(found, "benchmark", report.as_json())
        screen.print_line(f"\nsaved in {found.reports}: benchmark.json, benchmark.html")
        screen.print_result(report.as_json())


def show_benchmark(screen: Screen, report: Benchmark) -> None:
    """The table of what was measured, and what was not."""
    from training_lens.inference.benchmark_page import build_table, list_skipped_cells

    found, padding = build_table(report), (0, 1, 0, 0)
    title, columns, numbers = found.caption, found.columns, set(found.columns) - {"model"}
    show_table(screen.console, title, columns, found.rows, right=numbers, box=None, pad_edge=False, padding=padding)
    for line in list_skipped_cells(report):
        screen.print_line(line)
