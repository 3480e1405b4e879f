"""`training-lens explain rows`: the life of each training row, and the rows to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import locate_run, refuse_adapter_folder
from training_lens.cli.options import CommandOptions
from training_lens.cli.truncate_rank import RunArgument
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import cut_text

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
Retrain = Annotated[
    bool,
    typer.Option(
        "--retrain",
        help="Replay the run without the suspects, and without as many random rows of like length, and measure both on "
        "the validation rows.",
    ),
]
Exclude = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="With --retrain: the rows to leave out, instead of all suspects; as data.exclude reads it."
    ),
]
USED = ("output.", *OF_ANY_RUN)
SHOWN = 8  # rows of a list on the screen
WIDEST = 60  # characters of a text on the screen


def explain_rows(
    run: RunArgument = "latest",
    base: Base = False,
    learned: Learned = None,
    retrain: Retrain = False,
    exclude: Exclude = None,
    *,
    options: CommandOptions,
) -> None:
    """Show the life of each training row: when it was learned, what was forgotten, and which answers may be wrong.

    Reads the losses that the run recorded while it trained; --base and --retrain measure more.

    Examples: training-lens explain rows; training-lens explain rows RUN --base; training-lens explain rows --retrain
    """
    with command(options) as screen:
        run, options = options.split_run(run)
        refuse_adapter_folder(run, "explain rows reads the losses of rows that a run recorded")
        settings = load_config(options)
        refuse_unused(options.words, USED, "explain rows reads what the run recorded.")
        if exclude is not None and not retrain:
            raise ConfigurationError("--exclude FILE says what --retrain leaves out; give both.")
        if exclude is not None:
            from training_lens.data.row_list import read_row_list

            read_row_list(exclude, "--exclude")  # before the run is read
        found = locate_run(run, settings.output, finished=True if base or retrain else None)
        explained = _explain(screen, found, base, learned, settings)
        notes, result = list[str](), explained.as_json()
        if retrain:
            notes, result["retrained"] = _retrain(screen, found, explained, exclude, settings)
        from training_lens.analysis.explanations.rows_report import build_rows_report, rows_table

        build_rows_report(explained, notes).write_all(found.reports, "explain-rows", rows_table(explained))
        screen.print_line(f"saved as {found.reports / 'explain-rows'}.{{json,md,csv,html}}")
        screen.print_result(result)


def _explain(
    screen: Screen, run: RunFolder, base: bool, learned: float | None, settings: TrainingConfig
) -> RowsExplanation:
    from training_lens.analysis.explanations import rows_report as report
    from training_lens.analysis.explanations.row_explanation import RowsOptions
    from training_lens.analysis.explanations.row_explanation import explain_rows as explain_recorded_rows
    from training_lens.display.progress import Progress

    asked = RowsOptions(learned, base, settings.model.chosen_device, settings.explicit_values())
    found = explain_recorded_rows(run, asked, Progress(screen.console), screen.print_line)
    for line in report.describe_rows(found):
        screen.print_line(line)
    for name, listed in found.lists.items():
        shown = [
            [row.id, row.reason, cut_text(row.prompt, WIDEST), cut_text(row.answer, WIDEST)] for row in listed[:SHOWN]
        ]
        if shown:
            show_table(screen.console, f"{name}: {len(listed):,} rows", ["row", "why", "prompt", "answer"], shown)
    path = run.reports / "explain-rows-suspects.txt"
    path.unlink(missing_ok=True)  # of an earlier call
    if found.suspects:
        report.write_suspects(path, found.suspects)
        screen.print_line(f"the {len(found.suspects)} suspects: {path}; to train without them: data.exclude={path}")
    return found


def _retrain(
    screen: Screen, run: RunFolder, found: RowsExplanation, exclude: str | None, settings: TrainingConfig
) -> tuple[list[str], dict[str, object]]:
    """Train without the suspects and without random rows; gives lines for people, and values."""
    from training_lens.data.row_list import read_row_list
    from training_lens.display.progress import Progress
    from training_lens.training.row_retraining import RetrainingWithoutRows

    left_out = [row.id for row in found.suspects]
    if exclude is not None:
        left_out = [f"{source}:{number}" for source, number in read_row_list(exclude, "--exclude").lines]
    if not left_out:
        raise ConfigurationError("--retrain: there are no suspects to leave out. Name rows with --exclude FILE.")
    retraining = RetrainingWithoutRows(run, left_out, Progress(screen.console), settings.explicit_values())
    screen.print_line(retraining.describe_cost())
    measured = retraining.measure()
    for line in measured.describe():
        screen.print_line(line)
    return list(measured.describe()), measured.as_json()
