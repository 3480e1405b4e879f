"""The rows behind an answer, for `training-lens explain answer`: their options, and what is printed of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from training_lens.cli.common import Screen, show_table

if TYPE_CHECKING:
    from training_lens.analysis.explanations.row_evidence import AnswerRows
    from training_lens.config.schema import TrainingConfig
    from training_lens.data.examples import TokenizedExample
    from training_lens.runs.run_folder import RunFolder
    from training_lens.training.answer_rows import RowQuestions
    from training_lens.training.row_replay import RowReplay

Rows = Annotated[
    bool,
    typer.Option(
        "--rows",
        help="Also rank the training rows that made the answer: by gradients at the states that the run kept, a "
        "forward and a backward pass for each row and state.",
    ),
]
Verify = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="With the rows: measure the ranking. The run is replayed without the top N rows, and three times without "
        "N random ones of like length.",
    ),
]
Subsets = Annotated[
    int,
    typer.Option(
        "--lds",
        metavar="N",
        min=0,
        help="With the rows: how far the ranking can be trusted, by N replays of the run without a random half of its "
        "rows; at least 16. For small runs.",
    ),
]


def open_replay(screen: Screen, run: RunFolder, questions: RowQuestions, settings: TrainingConfig) -> RowReplay:
    """Check that the run can answer the questions, print what they cost, and open its replays.

    Args:
        settings: what the user gave, with the consent to code of the run's model.
    """
    from training_lens.display.progress import Progress
    from training_lens.training.answer_rows import describe_row_costs
    from training_lens.training.row_replay import RowReplay

    replay = RowReplay(run, Progress(screen.console), settings.explicit_values())
    for line in describe_row_costs(replay, questions):
        screen.print_line(line)
    return replay


def explain_rows(screen: Screen, replay: RowReplay, answer: TokenizedExample, questions: RowQuestions) -> AnswerRows:
    """Measure and print which training rows made an answer.

    Args:
        answer: prompt and answer; its supervised tokens are what is explained.
    """
    from training_lens.analysis.explanations import row_evidence_report as report
    from training_lens.display.progress import Progress
    from training_lens.training.answer_rows import explain_answer_rows

    if replay.run.adapter_scale != 1:
        screen.print_line("rows: of the adapter as it was trained, at scale 1")
    found = explain_answer_rows(replay, answer, questions, Progress(screen.console))
    table = report.ranking_table(found)
    show_table(screen.console, table.caption, table.columns, table.rows, right=set(table.columns[1:4]))
    for line in (report.describe_row_check(found), *report.describe_rows(found)):
        screen.print_line(line)
    return found
