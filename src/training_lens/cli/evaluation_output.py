"""What evaluate, baseline and compare share: opening the model and its rows, and printing the results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from training_lens.cli.common import Screen, print_table
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import cut_text
from training_lens.utils.launch import launched_rank

if TYPE_CHECKING:
    from training_lens.config.schema import TrainingConfig
    from training_lens.data.examples import Example
    from training_lens.evaluation.run_evaluation import BrokenAdapterError, EvaluationResult, ModelEvaluator
    from training_lens.runs.run_folder import RunFolder

SHOWN = 3
LONGEST_CELL = 300  # characters
NAME_WIDTH = 18  # characters of a row's name that are never folded
NAMES = {"evaluation": "evaluate", "evaluation-of-base": "evaluate_base"}  # names of the reports in trackers
EVALUATION_KEYS = ("evaluation.", "data.validation", "inference.adapter", "inference=")


def refuse_base_only(overrides: list[str] | None, *others: str) -> None:
    """Refuse settings that only a comparison with the base uses, and `others`."""
    if given := [t for t in overrides or [] if t.startswith(("evaluation.controls", "evaluation.forgetting", *others))]:
        raise ConfigurationError(f"{', '.join(given)}: only compare, of an adapter with its base, looks at it.")


def open_evaluator(screen: Screen, settings: TrainingConfig) -> tuple[ModelEvaluator, list[Example], Path]:
    """The evaluator of `inference.adapter`, its rows, and the folder for the reports.

    A run is evaluated on its own validation rows or on `data.validation`, and its folder keeps the reports. Any other
    model is evaluated on the config's rows, with a new folder under the experiment's `evaluations`.
    """
    from training_lens.display.progress import Progress
    from training_lens.evaluation.metrics import AnswerScoring
    from training_lens.evaluation.run_evaluation import ModelEvaluator
    from training_lens.inference.heldout_examples import configured_examples, validation_examples
    from training_lens.inference.session import open_session
    from training_lens.runs.run_folder import RunFolder, new_run_id, runs_folder
    from training_lens.runs.run_lookup import uses_own_model
    from training_lens.utils.devices import get_device
    from training_lens.utils.processes import Processes

    AnswerScoring.from_settings(settings.evaluation)  # refuses wrong settings before a model is loaded
    Processes(get_device(settings.model.device))  # under torchrun each process then has a device of its own
    session = open_session(settings)
    limit = settings.evaluation.max_examples
    if uses_own_model(settings.inference.adapter):
        examples = configured_examples(session, limit)
        output = settings.output
        runs = runs_folder(output.base_output_dir, output.experiment_name)
        folder = runs.with_name("evaluations") / new_run_id()
    else:
        run = RunFolder(Path(session.source))
        others = [str(source) for source in settings.data.validation] if settings.data.validation else None
        examples, folder = validation_examples(run, session, limit, others), run.reports
    return ModelEvaluator(session, settings.evaluation, Progress(screen.console)), examples, folder


def report_result(screen: Screen, result: EvaluationResult, evaluator: ModelEvaluator, folder: Path, name: str) -> None:
    """Write the reports and print them; of several processes the first one does."""
    from training_lens.evaluation.reports import write_reports

    if launched_rank():
        return

    folder.mkdir(parents=True, exist_ok=True)
    report = write_reports(result, folder, name, describe_evaluation(evaluator))
    if result.verdict is not None:
        first, *rest = result.verdict.text_lines()
        screen.print_line(first, style="bold")
        for line in rest:
            screen.print_line(line)
    _show_example(screen, result)
    _show_tables(screen, result)
    screen.print_line(f"\nsaved as {folder / name}.{{json,md,csv}}")
    send_to_trackers(evaluator.run, name, report)
    screen.print_result(report)


def send_to_trackers(run: RunFolder | None, name: str, report: dict[str, Any]) -> None:
    """Add a result to its run's journal, and send it to the run's trackers; nothing without a run."""
    from training_lens.integrations.send_run import record_evaluation, send_evaluations

    if run is not None:
        record_evaluation(run, NAMES.get(name, name), report)
        send_evaluations(run)


def describe_evaluation(evaluator: ModelEvaluator) -> dict[str, Any]:
    """How a report was made; `steps` shows whether the run has trained further since."""
    made: dict[str, Any] = {"run": evaluator.session.source, "settings": evaluator.settings.model_dump()}
    run = evaluator.run
    return {**made, "steps": evaluator.trained_steps, "adapter_scale": run.adapter_scale} if run else made


def report_broken_adapter(screen: Screen, error: BrokenAdapterError, evaluator: ModelEvaluator, folder: Path) -> None:
    """Write the verdict on an adapter whose losses are not finite, for the run's reports."""
    from training_lens.utils.integrity import write_sealed

    if launched_rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    report = {**describe_evaluation(evaluator), "verdict": error.verdict.as_json()}
    write_sealed(folder / "compare.json", report)
    screen.print_result(report)


def _show_example(screen: Screen, result: EvaluationResult) -> None:
    """Print one prompt with each model's answer: that of the first row with a prompt."""
    asked = [i for i, reason in enumerate(next(iter(result.outcomes.values())).finish_reasons) if reason]
    if not asked:
        return
    label, outcomes = result.comparison.model_label, result.outcomes
    lines = {"prompt": _prompt_text(result, asked[0]), "expected": result.rows.references[asked[0]]}
    for name, outcome in outcomes.items():
        text = outcome.answers[asked[0]].strip() or "(nothing)"
        lines[label(name)] = (
            f"{cut_text(text.strip(), 140)} [cut]" if outcome.finish_reasons[asked[0]] == "length" else text
        )
    width = max(map(len, lines)) + 2
    screen.console.print()
    for name, text in lines.items():
        screen.print_line(f"{name:<{width}}{cut_text(' '.join(text.split()), 160)}")
    screen.console.print()


def _prompt_text(result: EvaluationResult, row: int) -> str:
    """The last prompt of a row, after its domain."""
    example = result.rows.examples[row]
    if len(example.messages) < 2:
        return "(plain text)"
    asked = example.messages[-2]
    domain = f"[{example.domain}] " if example.domain else ""
    return f"{domain}{asked.text}\n{asked.input}"


def _show_tables(screen: Screen, result: EvaluationResult) -> None:
    """Print the tables of a result, then some rows with the models' answers side by side."""
    from training_lens.evaluation import reports

    comparison, whole = result.comparison, result.comparison.whole
    title = f"on {whole.rows} rows, {whole.supervised_tokens} supervised tokens"
    _print_table(screen, title, reports.measure_columns(comparison), reports.measure_rows(whole))
    for line in reports.scoring_lines(comparison):
        screen.print_line(line)
    if line := reports.leak_line(comparison):
        screen.print_line(line)
    _show_endings(screen, result)
    named = {"rows": "with and without training rows", "tokens": "by length", "domain": "by domain"}
    for what, title in named.items():
        head, *lines = reports.part_table(comparison, what, intervals=False)
        if len(lines) > 1:
            _print_table(screen, title, head, lines)
    if comparison.controls:
        head, *lines = reports.control_table(comparison, intervals=False)
        _print_table(screen, "the adapter on corrupted prompts", head, lines)
    for name, moved in (("most improved rows", comparison.improved), ("most worsened rows", comparison.worsened)):
        if moved:
            head, *lines = reports.moved_table(comparison, moved, whole_path=False)
            _print_table(screen, name, head, lines)
    if comparison.tasks:
        _print_table(screen, "lm-eval", reports.task_columns(comparison), reports.task_rows(comparison))
    if comparison.forgetting:
        screen.console.print(reports.forgetting_line(comparison), markup=False)
    _show_samples(screen, result)


def _show_endings(screen: Screen, result: EvaluationResult) -> None:
    """Print how many answers were cut and how many repeat themselves, if any."""
    comparison = result.comparison
    for model, endings in comparison.endings.items():
        cut = endings.unended + endings.cut_short
        if cut or endings.looping:
            screen.print_line(
                f"answers, {comparison.model_label(model)}: {cut} of {endings.answers} were cut at {endings.room} "
                f"tokens, {endings.looping} repeat themselves"
            )


def _print_table(screen: Screen, title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    table, lines = Table(title=title, title_justify="left"), list(rows)
    for i, column in enumerate(columns):
        shown_whole = None if i else min(NAME_WIDTH, max(len(cells[0]) for cells in lines))
        table.add_column(column, justify="right" if i else "left", overflow="fold", min_width=shown_whole)
    for cells in lines:
        table.add_row(*(Text(cell) for cell in cells))
    print_table(screen.console, table)


def _show_samples(screen: Screen, result: EvaluationResult) -> None:
    """Print some rows with the models' answers side by side, if there are answers."""
    from training_lens.evaluation.comparison import choose_samples

    if not any(text for outcome in result.outcomes.values() for text in outcome.answers):
        return
    examples = result.rows.examples
    table = Table(title=f"{min(SHOWN, len(examples))} of these rows", title_justify="left", show_lines=True)
    for column in ("prompt", "expected", *map(result.comparison.model_label, result.outcomes)):
        table.add_column(column, ratio=1)
    for i in choose_samples(examples, SHOWN):
        cells = [_prompt_text(result, i), result.rows.references[i]]
        cells += [outcome.answers[i] for outcome in result.outcomes.values()]
        table.add_row(*(Text(cut_text(cell.strip(), LONGEST_CELL)) for cell in cells))
    print_table(screen.console, table)
