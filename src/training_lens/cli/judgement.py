"""What evaluate, baseline and compare share: what is judged on which rows, and the tables that they print."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from training_lens.cli.common import Screen

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.data.types import Example
    from training_lens.evaluation.judging import Judge, Judgement

SHOWN = 3
NAME_WIDTH = 18  # characters of a row's name that no table folds
USED = ("evaluation.", "data.validation", "inference.adapter", "inference=")


def refuse_base_only(overrides: list[str] | None) -> None:
    """Refuse what only a comparison with the base looks at."""
    from training_lens.errors import ConfigurationError

    if given := [t for t in overrides or [] if t.startswith(("evaluation.controls", "evaluation.forgetting"))]:
        raise ConfigurationError(f"{', '.join(given)}: only compare, of an adapter with its base, looks at it.")


def opened(screen: Screen, settings: TrainingConfig) -> tuple[Judge, list[Example], Path]:
    """What `inference.adapter` names, ready to be judged; the rows to judge it on; the folder for the reports.

    A run is judged on its own validation rows, or on `data.validation`, and keeps the reports; anything else on the
    config's rows, and the reports go to a new folder under the experiment's `evaluations`.
    """
    from training_lens.evaluation.judging import Judge
    from training_lens.inference.rows import configured_examples, validation_examples
    from training_lens.inference.session import open_session
    from training_lens.utils.progress import Progress
    from training_lens.utils.run_lookup import uses_own_model
    from training_lens.utils.runs import RunFolder, evaluations_folder, new_run_id

    session = open_session(settings)
    limit = settings.evaluation.max_examples
    if uses_own_model(settings.inference.adapter):
        examples = configured_examples(session, limit)
        output = settings.output
        folder = evaluations_folder(output.base_output_dir, output.experiment_name) / new_run_id()
    else:
        run = RunFolder(Path(session.source))
        others = [str(source) for source in settings.data.validation] if settings.data.validation else None
        examples, folder = validation_examples(run, session, limit, others), run.reports
    return Judge(session, settings.evaluation, Progress(screen.console)), examples, folder


def finish(screen: Screen, judgement: Judgement, judge: Judge, folder: Path, name: str) -> None:
    """Write the reports, and print them."""
    from training_lens.evaluation.reports import write_reports

    folder.mkdir(parents=True, exist_ok=True)
    extra = {"run": judge.session.source, "settings": judge.settings.model_dump()}
    report = write_reports(judgement, folder, name, extra)
    show(screen, judgement)
    screen.console.print(f"\nsaved as {folder / name}.{{json,md,csv}}", markup=False, soft_wrap=True)
    screen.result(report)


def show(screen: Screen, judgement: Judgement) -> None:
    """The tables of a judgement, then some rows with the models' answers side by side."""
    from training_lens.evaluation import reports

    comparison = judgement.comparison
    show_whole(screen, judgement)
    for what, parts in (("tokens", comparison.by_length), ("domain", comparison.by_domain)):
        if len(parts) > 1:
            head, *lines = reports.part_table(comparison, what, intervals=False)
            _table(screen, f"by {'length' if what == 'tokens' else what}", head, lines)
    show_controls(screen, judgement)
    for name, moved in (("most improved rows", comparison.improved), ("most worsened rows", comparison.worsened)):
        if moved:
            _table(screen, name, reports.MOVED_COLUMNS, reports.moved_rows(moved, False))
    if comparison.tasks:
        _table(screen, "lm-eval", reports.task_columns(comparison), reports.task_rows(comparison))
    if comparison.forgetting:
        screen.console.print(reports.forgetting_line(comparison), markup=False)
    show_samples(screen, judgement)


def show_whole(screen: Screen, judgement: Judgement) -> None:
    """The measures over all rows."""
    from training_lens.evaluation import reports

    whole = judgement.comparison.whole
    title = f"on {whole.rows} rows, {whole.supervised_tokens} supervised tokens"
    _table(screen, title, reports.measure_columns(judgement.comparison), reports.measure_rows(whole))


def show_controls(screen: Screen, judgement: Judgement) -> None:
    """The controls, where there are any."""
    from training_lens.evaluation import reports

    if judgement.comparison.controls:
        head, *lines = reports.control_table(judgement.comparison, intervals=False)
        _table(screen, "the adapter on spoilt prompts", head, lines)


def _table(screen: Screen, title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table, lines = Table(title=title, title_justify="left"), list(rows)
    for i, column in enumerate(columns):
        shown_whole = None if i else min(NAME_WIDTH, max(len(cells[0]) for cells in lines))
        table.add_column(column, justify="right" if i else "left", overflow="fold", min_width=shown_whole)
    for cells in lines:
        table.add_row(*(Text(cell) for cell in cells))
    screen.console.print(table)


def show_samples(screen: Screen, judgement: Judgement) -> None:
    """Some rows with the models' answers side by side, where models were asked."""
    from rich.table import Table
    from rich.text import Text

    from training_lens.data.types import Message
    from training_lens.evaluation.comparison import samples

    if not any(text for outcome in judgement.outcomes.values() for text in outcome.answers):
        return
    examples = judgement.rows.examples
    table = Table(title=f"{min(SHOWN, len(examples))} of these rows", title_justify="left", show_lines=True)
    for column in ("prompt", "expected", *judgement.outcomes):
        table.add_column(column, ratio=1)
    for i in samples(examples, SHOWN):
        asks = len(examples[i].messages) > 1
        asked = examples[i].messages[-2] if asks else Message("user", "(plain text)")
        domain = f"[{examples[i].domain}] " if examples[i].domain else ""
        cells = [f"{domain}{asked.text}\n{asked.input}", judgement.rows.references[i]]
        cells += [outcome.answers[i] for outcome in judgement.outcomes.values()]
        table.add_row(*(Text(_short(cell)) for cell in cells))
    screen.console.print(table)


def _short(text: str, limit: int = 300) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
