"""Remarks on a verdict: thin evidence, unused prompts, answers that do not end, domains that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from training_lens.evaluation.answer_endings import Endings
from training_lens.evaluation.comparison import ADAPTER, BASE, ControlResult, ModelComparison, RowGroup
from training_lens.evaluation.controls import SHUFFLED_PROMPTS
from training_lens.evaluation.training_record import TrainingRecord
from training_lens.evaluation.verdict import (
    THIN_ROWS,
    MeasuredChange,
    Outcome,
    Remark,
    Severity,
    count_rows,
    name_measure,
)

HARDLY_READ = 0.05  # share of the loss: the cost of wrong prompts to an adapter that ignores its prompt
OFTEN, SOMETIMES = 0.2, 0.05  # shares of the answers: above, a problem or a warning
OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "no difference", "inconclusive")
MOSTLY_DISTINCT = 0.9  # share of the rows: a few duplicates change nothing
RIGHT_ALREADY = ("numeric", "json_fields", "exact_match")


def collect_remarks(
    comparison: ModelComparison, deciding: MeasuredChange, distinct_rows: int, training: TrainingRecord | None
) -> Iterator[Remark]:
    """All remarks on a comparison, in the order in which they are printed.

    Args:
        deciding: the measure that decides the verdict, over all rows.
        distinct_rows: rows without duplicates, which are no further evidence.
        training: the losses of the run whose adapter is evaluated.
    """
    if shuffled := comparison.controls.get(SHUFFLED_PROMPTS):
        yield prompt_remark(shuffled)
    base = None if comparison.is_of_two_runs else comparison.endings.get(BASE)
    for name, endings in comparison.endings.items():
        if name == ADAPTER or comparison.is_of_two_runs:
            yield from ending_remarks(endings, base, comparison.model_subject(name))
    yield from row_remarks(comparison.whole.rows, distinct_rows)
    yield from domain_remarks(comparison.by_domain, deciding)
    yield from base_remarks(comparison.whole, comparison.is_of_two_runs)
    if training is not None:
        yield from memory_remarks(training, comparison.whole)


def loose_remarks(outcome: Outcome, measures: Sequence[MeasuredChange]) -> Iterator[Remark]:
    """Answers that are worse by a loose measure, where the verdict says otherwise."""
    worse = next((change for change in measures if change.outcome() == "worse"), None)
    if worse is not None and outcome != "worse":
        by = name_measure(worse.measure)
        sentence = f"Its answers are further from the right ones by {by}: {worse.describe_change()}."
        yield Remark("other_measure", "warning", sentence, f"its answers are worse by {by}")


def prompt_remark(control: ControlResult) -> Remark:
    """Whether the adapter uses its prompt: its loss with the prompts of other rows."""
    loss, change = control.adapter["loss"], control.delta["loss"]
    between = control.intervals.get("loss")
    effect = f"with the prompts of other rows its loss is {loss + change:.4f}, {change:+.4f}"
    if between is None:
        return Remark("prompt_unknown", "note", f"Whether it uses its prompt is not known: {effect} (no interval).")
    effect += f" ({between[0]:+.4f} to {between[1]:+.4f})"
    little = HARDLY_READ * abs(loss)
    if between[0] > 0 and between[1] >= little:
        return Remark("prompt_used", "fine", f"It uses its prompt: {effect}.")
    if between[1] < little:
        how, code = ("hardly uses", "prompt_hardly_used") if between[0] > 0 else ("ignores", "prompt_ignored")
        sentence = f"It {how} its prompt: {effect}. It has learned the form of the answers, not to use the prompt."
        return Remark(code, "warning" if between[0] > 0 else "problem", sentence, f"it {how} its prompt")
    return Remark("prompt_unknown", "note", f"Whether it uses its prompt cannot be told from these rows: {effect}.")


def ending_remarks(endings: Endings, base: Endings | None, subject: str) -> Iterator[Remark]:
    """Answers that do not end, and answers that repeat themselves.

    Args:
        base: the endings of the base, where it answered as well.
        subject: the model: 'the adapter', or a run's name.
    """
    of = f"of {endings.answers} answers of {subject}"
    if endings.unended:
        base_too = f" (its base: {base.unended})" if base else ""
        sentence = (
            f"{endings.unended} {of} do not end within {endings.room} tokens, where the longest right answer has "
            f"{endings.longest}{base_too}. training-lens validate shows whether end tokens are learned."
        )
        severity = _ending_severity(endings.unended, endings.answers)
        yield Remark("never_ends", severity, sentence, f"{endings.unended} {of} do not end")
    if endings.looping:
        sentence = f"{endings.looping} {of} repeat the same tokens again and again."
        yield Remark(
            "loops", _ending_severity(endings.looping, endings.answers), sentence, f"{endings.looping} {of} loop"
        )
    if endings.cut_short:
        sentence = (
            f"{endings.cut_short} {of} were cut at {endings.room} tokens, which right answers need, too: whether they "
            "would end is not known (evaluation.max_new_tokens)."
        )
        yield Remark("cut_short", "note", sentence)


def _ending_severity(count: int, answers: int) -> Severity:
    share = count / answers
    return "problem" if share > OFTEN else "warning" if share > SOMETIMES else "note"


def row_remarks(rows: int, distinct: int) -> Iterator[Remark]:
    """Too few rows, or duplicated rows."""
    if distinct < MOSTLY_DISTINCT * rows:
        sentence = (
            f"Only {distinct} of the {count_rows(rows)} differ from each other: repeated rows are no further evidence, "
            "and make intervals too narrow."
        )
        yield Remark("repeated_rows", "warning", sentence)
    if distinct < THIN_ROWS:
        sentence = (
            f"Thin evidence: {count_rows(distinct)}. An interval from fewer than {THIN_ROWS} is itself unsure; "
            "evaluate on more (data.validation=FILE)."
        )
        yield Remark("thin_evidence", "warning", sentence)


def domain_remarks(groups: Mapping[str, RowGroup], deciding: MeasuredChange) -> Iterator[Remark]:
    """Domains that differ: better on one, and not on another."""
    found = {name: _group_change(group, deciding) for name, group in groups.items()}
    outcomes = {name: change.outcome() for name, change in found.items() if change is not None}
    seen = set(outcomes.values())
    if len(seen) > 1 and seen & {"better", "worse"}:
        by_outcome = {kind: [name for name, outcome in outcomes.items() if outcome == kind] for kind in OUTCOMES}
        parts = [f"{kind} on {', '.join(names)}" for kind, names in by_outcome.items() if names]
        yield Remark("domains_part", "warning" if "worse" in seen else "note", f"By domain: {'; '.join(parts)}.")


def _group_change(group: RowGroup, deciding: MeasuredChange) -> MeasuredChange | None:
    measure = deciding.measure
    before, after = (group.models.get(name, {}).get(measure) for name in (BASE, ADAPTER))
    if before is None or after is None:
        return None
    return replace(deciding, before=before, after=after, interval=group.intervals.get(measure), rows=group.rows)


def base_remarks(whole: RowGroup, is_of_two_runs: bool) -> Iterator[Remark]:
    """A base that answers every row right leaves nothing to gain."""
    base = {} if is_of_two_runs else whole.models.get(BASE, {})
    perfect = next((name for name in RIGHT_ALREADY if base.get(name) == 1.0), None)
    if perfect:
        by = name_measure(perfect)
        sentence = f"The base gives every right answer already ({by} 100.0%): these rows can show no gain by it."
        yield Remark("base_perfect", "note", sentence)


def memory_remarks(training: TrainingRecord, whole: RowGroup) -> Iterator[Remark]:
    """Overfitting: the training rows were memorized, and these rows gained nothing."""
    loss, base = whole.models[ADAPTER]["loss"], whole.models[BASE]["loss"]
    if training.is_far_below(loss) and (training.has_rising_loss() or loss >= base):
        sentence = (
            f"It memorized its training rows: their loss is {training.late_train_loss:.4f} at the end, and "
            f"that of these rows {loss:.4f}. Fewer epochs, a lower rate, or more rows."
        )
        yield Remark("memorized", "warning", sentence, "it memorized its training rows")
