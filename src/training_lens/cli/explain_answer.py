"""`training-lens explain answer`: why one answer changed, by token, layer and module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from training_lens.cli.common import OF_ANY_RUN, Screen, command, load_config, refuse_unused, show_table
from training_lens.cli.find_runs import is_adapter_folder, locate_run, refuse_adapter_folder
from training_lens.cli.options import CommandOptions
from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    from training_lens.analysis.explanations.answer_changes import AnswerChange
    from training_lens.analysis.explanations.answer_question import AnswerQuestion
    from training_lens.analysis.explanations.row_evidence import AnswerRows
    from training_lens.config.schema import TrainingConfig
    from training_lens.data.examples import TokenizedExample
    from training_lens.inference.session import Session
    from training_lens.runs.run_folder import RunFolder
    from training_lens.training.row_ranking import RowQuestions
    from training_lens.training.row_replay import RowReplay

Words = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run's id or folder, an experiment (its last run), or 'latest'."),
]
Prompt = Annotated[str | None, typer.Argument(help="What to ask; not with --row.", show_default=False)]
Row = Annotated[
    str | None, typer.Option(metavar="ID", help="A row of the run's data instead of a prompt: its file and number.")
]
Answer = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The answer to explain; else the adapter's own, greedy.")
]
OwnAnswer = Annotated[bool, typer.Option("--own-answer", help="With --row: the row's own answer.")]
Token = Annotated[
    int | None, typer.Option(metavar="N", help="The token to look at, from 1; else the one with the largest change.")
]
Domain = Annotated[str | None, typer.Option(metavar="NAME", help="One of the domains that the run was trained on.")]
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
MOST_TOKENS = 16  # on the screen; the reports have all
USED = ("data.validation", "inference.max_new_tokens", "output.", *OF_ANY_RUN)


@dataclass(frozen=True)
class AnswerOptions:
    """Which answer is explained, and which of its tokens."""

    row: Row = None
    answer: Answer = None
    own_answer: OwnAnswer = False
    token: Token = None
    domain: Domain = None
    rows: Rows = False
    verify: Verify = 0
    lds: Subsets = 0

    @property
    def has_rows(self) -> bool:
        """Whether training rows are asked for."""
        return self.rows or bool(self.verify or self.lds)


def explain_answer(run: Words = None, prompt: Prompt = None, *, asked: AnswerOptions, options: CommandOptions) -> None:
    """Explain what a finished adapter changed about one answer, beside its base.

    The change of each token's log-probability, the layers where base and adapter part by the logit lens, and the
    modules that made the change at one token; with --rows also the training rows that made the answer, and with
    --verify what it loses without them.

    Examples: training-lens explain answer RUN "A prompt"; training-lens explain answer latest "A prompt" --answer No;
    training-lens explain answer RUN --row data/train.jsonl:17 --own-answer --token 3;
    training-lens explain answer RUN "A prompt" --verify 10;
    training-lens explain answer ADAPTER "A prompt" model.id=BASE
    """
    with command(options) as screen:
        reference, text, words = _split_words(run, prompt, options.words, asked.row is not None)
        settings = load_config(options.with_words(words))
        if text is not None and reference == "latest":
            _refuse_run_alone(text, settings.output.base_output_dir)
        from training_lens.analysis.explanations.answer_question import AnswerQuestion

        place = None if asked.token is None else asked.token - 1
        question = AnswerQuestion(text, asked.row, asked.answer, asked.own_answer, asked.domain, place)
        question.check()
        if is_adapter_folder(reference):
            _explain_folder(screen, reference, question, asked, words, settings)
            return
        refuse_unused(words, USED, "explain answers with the run's own config.")
        found = locate_run(reference, settings.output, finished=True)
        found.require_adapter()
        from training_lens.inference.session import open_run
        from training_lens.training.row_ranking import RowQuestions
        from training_lens.utils.devices import free_memory

        questions = RowQuestions(verify=asked.verify, subsets=asked.lds)
        replay = open_replay(screen, found, questions, settings) if asked.has_rows else None
        session = open_run(found, settings.model.chosen_device, given=settings.explicit_values())
        change = _measure(screen, found, session, question, settings)
        del session
        free_memory()  # rows are ranked around a base of their own
        rows = explain_rows(screen, replay, change.supervised_answer, questions) if replay else None
        change = replace(change, rows=rows.as_json()) if rows else change
        _save(screen, change, found.reports, rows)
        screen.print_result(change.as_json())


def _explain_folder(
    screen: Screen,
    reference: str,
    question: AnswerQuestion,
    asked: AnswerOptions,
    words: list[str],
    settings: TrainingConfig,
) -> None:
    """Explain an answer of an adapter without its run, on the config's base."""
    if asked.has_rows:
        refuse_adapter_folder(reference, "rows are ranked and replayed by the rows and states that a run keeps")
    refuse_unused(words, (*USED, "model.", "data."), "explain trains nothing.")
    own = settings.replace_keys(inference={"adapter": reference})
    from training_lens.cli.missing_files import check_base

    check_base(own)
    from training_lens.analysis.explanations.explained_adapter import ExplainedAdapter
    from training_lens.inference.session import open_session

    reports = ExplainedAdapter.from_folder(own).reports
    change = _measure(screen, None, open_session(own), question, settings)
    _save(screen, change, reports, None)
    screen.print_result(change.as_json())


def _measure(
    screen: Screen, run: RunFolder | None, session: Session, question: AnswerQuestion, settings: TrainingConfig
) -> AnswerChange:
    from training_lens.analysis.explanations.answer_measurement import explain_answer as measure
    from training_lens.display.progress import Progress

    others = [str(source) for source in settings.data.validation or ()] if run else ()
    progress = Progress(screen.console)
    change = measure(
        run, session, question, settings.inference, others=others, progress=progress, announce=screen.print_line
    )
    _show(screen, change)
    return change


def _split_words(
    run: str | None, prompt: str | None, words: list[str], has_row: bool
) -> tuple[str, str | None, list[str]]:
    """The run, the prompt and the settings. One word alone is a prompt to the latest run, or with --row the run."""
    from training_lens.cli.infer import is_setting
    from training_lens.runs.run_folder import parse_start_time

    given = [word for word in (run, prompt) if word is not None]
    if has_row:
        names = [word for word in given if not is_setting(word)]
        if len(names) > 1:
            raise ConfigurationError(f"the prompt '{names[1]}' and --row given: give one of them.")
        return (names or ["latest"])[0], None, [*(word for word in given if is_setting(word)), *words]
    if len(given) == 2 and is_setting(given[1]):
        words, given = [given[1], *words], given[:1]
    if len(given) == 1:
        if given[0] == "latest" or Path(given[0]).is_dir() or parse_start_time(given[0]):
            _refuse_missing_prompt(given[0])
        return "latest", given[0], words
    return (given[0], given[1], words) if given else ("latest", None, words)


def _refuse_run_alone(word: str, base_output_dir: str) -> None:
    from training_lens.runs.run_lookup import find_run_folders

    if word in (run.run_id for run in find_run_folders(base_output_dir)):
        _refuse_missing_prompt(word)


def _refuse_missing_prompt(run: str) -> NoReturn:
    raise ConfigurationError(f"explain answer {run}: give a prompt after the run, or --row ID.")


def _show(screen: Screen, change: AnswerChange) -> None:
    from training_lens.analysis.explanations import answer_report as report

    answers, tokens = report.answers_table(change), report.token_table(change, MOST_TOKENS)
    show_table(screen.console, answers.caption, answers.columns, answers.rows)
    show_table(screen.console, tokens.caption, tokens.columns, tokens.rows, right=set(tokens.columns[2:6]))
    by_layer = report.group_table(change, "layer")
    show_table(screen.console, by_layer.caption, by_layer.columns, by_layer.rows, right=set(by_layer.columns[1:]))
    for line in report.describe_answer(change):
        screen.print_line(line)
    for part in (change.at_token, change.whole):
        screen.print_line(report.describe_check(part))


def _save(screen: Screen, change: AnswerChange, reports: Path, rows: AnswerRows | None) -> None:
    from training_lens.analysis.explanations.answer_report import build_answer_report, build_row_parts, token_table

    parts = build_row_parts(rows) if rows else ()
    build_answer_report(change, parts).write_all(reports, "explain-answer", token_table(change))
    screen.print_line(f"saved as {reports / 'explain-answer'}.{{json,md,csv,html}}")


def open_replay(screen: Screen, run: RunFolder, questions: RowQuestions, settings: TrainingConfig) -> RowReplay:
    """Check that the run can answer the questions, print what they cost, and open its replays.

    Args:
        settings: what the user gave, with the consent to code of the run's model.
    """
    from training_lens.display.progress import Progress
    from training_lens.training.row_ranking import describe_row_costs
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
    from training_lens.analysis.explanations import answer_report as report
    from training_lens.display.progress import Progress
    from training_lens.training.row_ranking import explain_answer_rows

    if replay.run.adapter_scale != 1:
        screen.print_line("rows: of the adapter as it was trained, at scale 1")
    found = explain_answer_rows(replay, answer, questions, Progress(screen.console))
    table = report.ranking_table(found)
    show_table(screen.console, table.caption, table.columns, table.rows, right=set(table.columns[1:4]))
    for line in (report.describe_row_check(found), *report.describe_rows(found)):
        screen.print_line(line)
    return found
