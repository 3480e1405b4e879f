"""An evaluation as files: JSON for programs, Markdown for people, CSV with a line for each row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training_lens.display.markdown import escape_markdown, markdown_table
from training_lens.evaluation.comparison import ModelComparison, MovedRow, RowGroup
from training_lens.evaluation.run_evaluation import EvaluationResult
from training_lens.evaluation.verdict import Interval, format_measure
from training_lens.utils.files import hash_file, write_text
from training_lens.utils.formatting import pluralize
from training_lens.utils.integrity import write_sealed

Cells = tuple[str, ...]
MARK = "*"  # of numbers over rows that the model was trained on


def write_reports(result: EvaluationResult, folder: Path | str, name: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write {name}.json, {name}.md and {name}.csv into `folder`; returns the JSON object.

    The object holds `extra`, the sources of the rows with the sha256 of files, the verdict, and the comparison.
    """
    sources = sorted({example.file for example in result.rows.examples})
    files = {name: hash_file(Path(name)) if Path(name).is_file() else None for name in sources}
    folder = Path(folder)
    verdict = {"verdict": result.verdict.as_json()} if result.verdict else {}
    report = {**extra, "files": files, **verdict, **result.comparison.as_json()}
    texts = {".md": render_markdown(result), ".csv": render_row_csv(result)}
    write_sealed(folder / f"{name}.json", report)
    for ending, text in texts.items():
        write_text(folder / f"{name}{ending}", text)
    return report


def measure_rows(group: RowGroup) -> Iterator[Cells]:
    """A line for each measure: name, each model's value, and for two models the difference and its interval."""
    models = group.models.values()
    sign = "+" if len(models) > 1 else ""
    for name in dict.fromkeys(name for measures in models for name in measures):
        change = _format_values(name, [group.delta], "+") * (len(models) - 1)
        yield (name, *_format_values(name, models), *change, _format_interval(name, group.intervals, sign))


def _format_values(measure: str, models: Iterable[Mapping[str, float]], sign: str = "") -> list[str]:
    """The measure of each model, '-' where there is none."""
    return [format_measure(measure, values[measure], sign) if measure in values else "-" for values in models]


def _format_interval(measure: str, intervals: Mapping[str, Interval], sign: str) -> str:
    return " to ".join(format_measure(measure, end, sign) for end in intervals.get(measure, ())) or "-"


def measure_columns(comparison: ModelComparison) -> Cells:
    """The column headers of `measure_rows`."""
    mark = MARK if comparison.whole.leaked else ""
    models = tuple(f"{comparison.model_label(model)}{mark}" for model in comparison.models)
    interval = f"{comparison.confidence:.0%} interval"
    return ("", *models, *(("change", f"its {interval}") if len(models) > 1 else (interval,)))


def part_table(comparison: ModelComparison, what: str, intervals: bool = True) -> list[Cells]:
    """The header, then a line for each part of the rows by `what` ('tokens', 'domain' or 'rows', which are those in
    training and the others): size, losses, exact match. Parts with training rows are marked."""
    parts = {"tokens": comparison.by_length, "domain": comparison.by_domain, "rows": comparison.by_leak}[what]
    models = tuple(map(comparison.model_label, comparison.models))
    head = [what, "rows", *(f"loss, {model}" for model in models)]
    head += ["change"] if len(models) > 1 else []
    head += [f"{comparison.confidence:.0%} interval"] if intervals else []
    answered = any("exact_match" in measures for measures in comparison.whole.models.values())
    head += [f"exact, {model}" for model in models] if answered else []
    lines = [tuple(head)]
    for label, group in parts.items():
        measures, sign = group.models.values(), "+" if len(models) > 1 else ""
        cells = [label + MARK * bool(group.leaked), str(group.rows), *_format_values("loss", measures)]
        cells += _format_values("loss", [group.delta], "+") if group.delta else []
        cells += [_format_interval("loss", group.intervals, sign)] if intervals else []
        cells += _format_values("exact_match", measures) if answered else []
        lines.append(tuple(cells))
    return lines


def control_table(comparison: ModelComparison, intervals: bool = True) -> list[Cells]:
    """The header, then a line for each control: rows, loss with own and corrupted prompts, change, exact match."""
    head = ["control", "rows", "loss", "corrupted", "change"]
    head += [f"{comparison.confidence:.0%} interval"] if intervals else []
    answered = any("exact_match" in control.scores for control in comparison.controls.values())
    head += ["exact", "corrupted"] if answered else []
    lines = [tuple(head)]
    for name, control in comparison.controls.items():
        sides = (control.adapter, control.scores)
        cells = [name.replace("_", " "), str(control.rows), *_format_values("loss", sides)]
        cells += _format_values("loss", [control.delta], "+")
        cells += [_format_interval("loss", control.intervals, "+")] if intervals else []
        cells += _format_values("exact_match", sides) if answered else []
        lines.append(tuple(cells))
    return lines


def moved_table(comparison: ModelComparison, moved: Sequence[MovedRow], whole_path: bool = True) -> list[Cells]:
    """The header, then a line for each row: id, losses, change."""
    lines: list[Cells] = [("row", *map(comparison.model_label, comparison.models), "change")]
    for row in moved:
        change = row.adapter_loss - row.base_loss
        name = row.id if whole_path else Path(row.id).name
        lines.append((name, f"{row.base_loss:.4f}", f"{row.adapter_loss:.4f}", f"{change:+.4f}"))
    return lines


def task_rows(comparison: ModelComparison) -> Iterator[Cells]:
    """A line for each metric of each task: each model's value, with its standard error if there is one."""
    first = next(iter(comparison.tasks.values()), {})
    for task, metrics in first.items():
        for metric in metrics:
            name, comma, filtered = metric.partition(",")
            if not name.endswith("_stderr"):
                found = [scores[task] for scores in comparison.tasks.values()]
                errors = [scores.get(f"{name}_stderr{comma}{filtered}") for scores in found]
                values = [f"{scores[metric]:.4f}" for scores in found]
                with_errors = zip(values, errors, strict=True)
                yield (task, metric, *(v if error is None else f"{v} ± {error:.4f}" for v, error in with_errors))


def task_columns(comparison: ModelComparison) -> Cells:
    """The column headers of `task_rows`."""
    return ("task", "metric", *map(comparison.model_label, comparison.tasks))


def render_markdown(result: EvaluationResult) -> str:
    """The verdict and the tables of a comparison as Markdown."""
    comparison = result.comparison
    models = ", ".join(f"{comparison.model_label(name)}: `{what}`" for name, what in comparison.models.items())
    whole = comparison.whole
    parts = ["\n".join(result.verdict.text_lines())] if result.verdict else []
    parts.append(f"{models}. {whole.rows} rows, {whole.supervised_tokens} supervised tokens.")
    parts.append(_render_table([measure_columns(comparison), *measure_rows(whole)]))
    parts.append("\n".join(f"- {line}" for line in scoring_lines(comparison)))
    if line := leak_line(comparison):
        parts.append(escape_markdown(line))
    parts += [_render_table(part_table(comparison, what)) for what in ("rows", "tokens", "domain")]
    parts.append(_render_table(control_table(comparison)))
    for title, moved in (("Most improved", comparison.improved), ("Most worsened", comparison.worsened)):
        if moved:
            parts.append(f"{title}, loss in nats per supervised token:")
            parts.append(_render_table(moved_table(comparison, moved)))
    parts.append(_render_table([task_columns(comparison), *task_rows(comparison)]))
    if comparison.forgetting:
        parts.append(forgetting_line(comparison))
    return "\n\n".join(filter(None, parts)) + "\n"


def scoring_lines(comparison: ModelComparison) -> list[str]:
    """Which rows a measure leaves out, and why; how numbers were read."""
    by_reasons: dict[str, list[str]] = {}
    for measure, reasons in comparison.unscored.items():
        left_out = "; ".join(f"{pluralize(count, 'row')} ({why})" for why, count in reasons.items())
        by_reasons.setdefault(left_out, []).append(measure)
    lines = [f"{', '.join(measures)}: without {left_out}" for left_out, measures in by_reasons.items()]
    return [*lines, f"numeric: {comparison.number_reading}"] if comparison.number_reading else lines


def leak_line(comparison: ModelComparison) -> str:
    """How many rows are training rows, too, or why that is not known; empty where none is."""
    trained = comparison.trained
    if trained.leaked is not None and not trained.leaked.any():
        return ""
    return trained.describe() if trained.leaked is None else f"{MARK} {trained.describe()}"


def forgetting_line(comparison: ModelComparison) -> str:
    """The change of the loss on other text, as a sentence."""
    forgot = comparison.forgetting
    assert forgot is not None
    between = ""
    if forgot.interval:
        between = f" ({comparison.confidence:.0%}: {forgot.interval[0]:+.4f} to {forgot.interval[1]:+.4f})"
    return (
        f"On {forgot.rows} rows of other text the loss went from {forgot.base_loss:.4f} to {forgot.adapter_loss:.4f}, "
        f"{forgot.delta:+.4f}{between} nats per token."
    )


def _render_table(lines: Sequence[Cells]) -> str:
    """The header and its rows as Markdown; empty where there are no rows."""
    head, *rows = lines
    return markdown_table(head, [[escape_markdown(cell) for cell in row] for row in rows]) if rows else ""


def render_row_csv(result: EvaluationResult) -> str:
    """A line for each row: id, domain, lengths, expected answer, and each model's loss, answer and scores."""
    rows = result.rows
    names = [(model, score) for model, o in result.outcomes.items() for score in o.scored.row_scores]
    models = list(result.outcomes)
    head = ["id", "domain", "tokens", "supervised_tokens", "expected"]
    head += [f"{model}_{column}" for model in models for column in ("loss", "answer", "finish_reason")]
    head += [*(f"{model}_{score}" for model, score in names), "in_training"]
    leaked = result.comparison.trained.leaked
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(head)
    for i, example in enumerate(rows.examples):
        sizes = (rows.dataset.lengths[i], rows.dataset.supervised_counts[i])
        line = [example.id, example.domain or "", *sizes, rows.references[i]]
        for model in models:
            outcome = result.outcomes[model]
            loss = outcome.scored.sums.nll[i] / outcome.scored.sums.tokens[i]
            line += [f"{loss:.6f}", outcome.answers[i], outcome.finish_reasons[i]]
        scores = (result.outcomes[model].scored.row_scores[score][i] for model, score in names)
        mark = "" if leaked is None else int(leaked[i])
        writer.writerow([*line, *("" if value != value else f"{value:.6g}" for value in scores), mark])
    return text.getvalue()
