"""The verdict of a comparison: which measure decides, what contradicts it, what to know beside it, what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from training_lens.display.html import Severity
from training_lens.errors import ConfigurationError
from training_lens.evaluation.answer_endings import Endings
from training_lens.evaluation.comparison import (
    ADAPTER,
    BASE,
    NEW_ROWS,
    SHUFFLED_PROMPTS,
    ControlResult,
    ModelComparison,
    RowGroup,
)
from training_lens.evaluation.metrics import AnswerScoring
from training_lens.evaluation.training_verdict import TrainingRecord
from training_lens.evaluation.verdict import (
    LOWER_IS_BETTER,
    ORDER,
    THIN_ROWS,
    MeasuredChange,
    Outcome,
    Remark,
    Verdict,
    assess_changes,
    name_measure,
    next_command,
)
from training_lens.utils.formatting import did_you_mean, pluralize

LOSS, ACROSS_TOKENS = "loss", "bits_per_byte"
LOOSE_MEASURES = ("token_f1", "chrf")  # an answer is more or less near to the right one
STRICT_MEASURES = ("numeric", "json_fields", "exact_match", "json_valid")  # an answer is right or it is not
HARDLY_READ = 0.05  # share of the loss: the cost of wrong prompts to an adapter that ignores its prompt
OFTEN, SOMETIMES = 0.2, 0.05  # shares of the answers: above, a problem or a warning
OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "no difference", "inconclusive")
MOSTLY_DISTINCT = 0.9  # share of the rows: a few duplicates change nothing
LEAKED = 0.01  # share of the rows: fewer training rows among them are a note
RIGHT_ALREADY = ("numeric", "json_fields", "exact_match")


def assess_comparison(
    comparison: ModelComparison,
    scoring: AnswerScoring,
    *,
    decide_by: str | None,
    distinct_rows: int,
    training: TrainingRecord | None = None,
    run: str = "",
) -> Verdict:
    """The verdict of a comparison of two models.

    The loss decides (bits per byte, where the two tokenize differently), unless the user names another measure.

    Args:
        scoring: knows which of the user's metrics are better when lower.
        distinct_rows: rows without duplicates, which are no further evidence.
        training: the losses of the run whose adapter is evaluated.
        run: its folder, for the next command; empty if it is not a run.

    Raises:
        ConfigurationError: the chosen measure was not computed.
    """
    everything = comparison
    comparison = replace(everything, whole=everything.by_leak.get(NEW_ROWS, everything.whole))  # none is in training
    changes = list_changes(comparison, scoring)
    chosen = decide_by or (LOSS if LOSS in changes else ACROSS_TOKENS)
    if chosen not in changes:
        raise ConfigurationError(
            f"evaluation.decide_by: '{chosen}' is not measured for both on these rows; there are: "
            f"{', '.join(changes)}.{did_you_mean(chosen, sorted(changes))}"
        )
    names = (comparison.model_subject(ADAPTER), comparison.model_subject(BASE))
    is_identical = LOSS in comparison.whole.delta and not comparison.improved and not comparison.worsened
    others = [changes[name] for name in (*scoring.own, *STRICT_MEASURES, LOSS) if name in changes and name != chosen]
    deciding = replace(changes[chosen], rows=min(changes[chosen].rows, distinct_rows))
    verdict = assess_changes(deciding, others, names, is_chosen=decide_by is not None, is_identical=is_identical)
    loose = [changes[name] for name in LOOSE_MEASURES if name in changes and name != chosen]
    remarks = (
        *verdict.remarks,
        *loose_remarks(verdict.outcome, loose),
        *leak_remarks(everything),
        *collect_remarks(comparison, changes[chosen], distinct_rows, training),
    )
    verdict = replace(verdict, remarks=tuple(sorted(remarks, key=lambda remark: ORDER.index(remark.severity))))
    but = [remark.but for remark in verdict.remarks if remark.severity in ("problem", "warning") and remark.but]
    if everything.whole.leaked == everything.whole.rows:
        sentence = f"Inconclusive: {everything.trained.describe()}."
        decide = "rows that the model was not trained on: data.validation=FILE"
        verdict = replace(verdict, outcome="inconclusive", sentence=sentence, decide=decide)
        return replace(verdict, next_command=next_command(verdict, run))
    sentence = verdict.sentence
    if verdict.outcome == "better" and but:
        sentence = f"{sentence.removesuffix('.')}; but {', and '.join(but)}."
    return replace(verdict, sentence=sentence, next_command=next_command(verdict, run))


def leak_remarks(comparison: ModelComparison) -> Iterator[Remark]:
    """A warning where rows are in training, too."""
    if leaked := comparison.whole.leaked:
        left = comparison.whole.rows - leaked
        sentence = f"{comparison.trained.describe()}. " + (
            f"The verdict is on the other {left}." if left else "None is left for a verdict."
        )
        severity: Severity = "warning" if leaked >= LEAKED * comparison.whole.rows else "note"
        yield Remark("leaks", severity, sentence, f"{leaked} more rows are training rows")


def list_changes(comparison: ModelComparison, scoring: AnswerScoring) -> dict[str, MeasuredChange]:
    """Every measure that can be compared between the two models."""
    whole = comparison.whole
    base, adapter = whole.models[BASE], whole.models[ADAPTER]
    return {
        name: MeasuredChange(
            name,
            base[name],
            adapter[name],
            whole.intervals.get(name),
            whole.rows,
            comparison.confidence,
            scoring.own[name].lower_is_better if name in scoring.own else name in LOWER_IS_BETTER,
        )
        for name in whole.delta
    }


def collect_remarks(
    comparison: ModelComparison, deciding: MeasuredChange, distinct_rows: int, training: TrainingRecord | None
) -> Iterator[Remark]:
    """All remarks on a comparison, in the order in which they are printed; arguments as in `assess_comparison`."""
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
    """Answers that do not end, and answers that repeat themselves, of a model named `subject`."""

    def severity(count: int) -> Severity:
        share = count / endings.answers
        return "problem" if share > OFTEN else "warning" if share > SOMETIMES else "note"

    of = f"of {endings.answers} answers of {subject}"
    if endings.unended:
        base_too = f" (its base: {base.unended})" if base else ""
        sentence = (
            f"{endings.unended} {of} do not end within {endings.room} tokens, where the longest right answer has "
            f"{endings.longest}{base_too}. training-lens validate shows whether end tokens are learned."
        )
        yield Remark("never_ends", severity(endings.unended), sentence, f"{endings.unended} {of} do not end")
    if endings.looping:
        sentence = f"{endings.looping} {of} repeat the same tokens again and again."
        yield Remark("loops", severity(endings.looping), sentence, f"{endings.looping} {of} loop")
    if endings.cut_short:
        sentence = (
            f"{endings.cut_short} {of} were cut at {endings.room} tokens, which right answers need, too: whether they "
            "would end is not known (evaluation.max_new_tokens)."
        )
        yield Remark("cut_short", "note", sentence)


def row_remarks(rows: int, distinct: int) -> Iterator[Remark]:
    """Too few rows, or duplicated rows."""
    if distinct < MOSTLY_DISTINCT * rows:
        sentence = (
            f"Only {distinct} of the {pluralize(rows, 'row')} differ from each other: repeated rows are no further "
            "evidence, and make intervals too narrow."
        )
        yield Remark("repeated_rows", "warning", sentence)
    if distinct < THIN_ROWS:
        sentence = (
            f"Thin evidence: {pluralize(distinct, 'row')}. An interval from fewer than {THIN_ROWS} is itself unsure; "
            "evaluate on more (data.validation=FILE)."
        )
        yield Remark("thin_evidence", "warning", sentence)


def domain_remarks(groups: Mapping[str, RowGroup], deciding: MeasuredChange) -> Iterator[Remark]:
    """Domains that differ: better on one, and not on another."""
    outcomes: dict[str, Outcome] = {}
    for name, group in groups.items():
        before, after = (group.models.get(model, {}).get(deciding.measure) for model in (BASE, ADAPTER))
        if before is not None and after is not None:
            interval = group.intervals.get(deciding.measure)
            change = replace(deciding, before=before, after=after, interval=interval, rows=group.rows)
            outcomes[name] = change.outcome()
    seen = set(outcomes.values())
    if len(seen) > 1 and seen & {"better", "worse"}:
        by_outcome = {kind: [name for name, outcome in outcomes.items() if outcome == kind] for kind in OUTCOMES}
        parts = [f"{kind} on {', '.join(names)}" for kind, names in by_outcome.items() if names]
        yield Remark("domains_part", "warning" if "worse" in seen else "note", f"By domain: {'; '.join(parts)}.")


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
    elif training.is_far_below(loss):
        yield Remark("train_gap", "note", training.describe_gap(loss))
