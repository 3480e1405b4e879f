"""The verdict of a comparison: which measure decides, what contradicts it, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace

from training_lens.errors import ConfigurationError
from training_lens.evaluation.comparison import ADAPTER, BASE, ModelComparison
from training_lens.evaluation.metrics import AnswerScoring
from training_lens.evaluation.remarks import collect_remarks, loose_remarks
from training_lens.evaluation.training_record import TrainingRecord
from training_lens.evaluation.verdict import LOWER_IS_BETTER, ORDER, MeasuredChange, Verdict, assess_changes
from training_lens.utils.formatting import did_you_mean

LOSS, ACROSS_TOKENS = "loss", "bits_per_byte"
LOOSE_MEASURES = ("token_f1", "chrf")  # an answer is more or less near to the right one
STRICT_MEASURES = ("numeric", "json_fields", "exact_match", "json_valid")  # an answer is right or it is not


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
        decide_by: the measure that the user chose.
        distinct_rows: rows without duplicates.
        training: the losses of the run whose adapter is evaluated.
        run: its folder, for the next command; empty if it is not a run.

    Raises:
        ConfigurationError: the chosen measure was not computed.
    """
    changes = list_changes(comparison, scoring)
    chosen = decide_by or (LOSS if LOSS in changes else ACROSS_TOKENS)
    if chosen not in changes:
        raise ConfigurationError(_unknown_measure(chosen, changes))
    names = (comparison.model_subject(ADAPTER), comparison.model_subject(BASE))
    others = [changes[name] for name in (*scoring.own, *STRICT_MEASURES, LOSS) if name in changes and name != chosen]
    deciding = replace(changes[chosen], rows=min(changes[chosen].rows, distinct_rows))
    verdict = assess_changes(
        deciding, others, names, is_chosen=decide_by is not None, is_identical=_is_identical(comparison)
    )
    loose = [changes[name] for name in LOOSE_MEASURES if name in changes and name != chosen]
    remarks = (
        *verdict.remarks,
        *loose_remarks(verdict.outcome, loose),
        *collect_remarks(comparison, changes[chosen], distinct_rows, training),
    )
    verdict = replace(verdict, remarks=tuple(sorted(remarks, key=lambda remark: ORDER.index(remark.severity))))
    return replace(verdict, sentence=_with_reservations(verdict), next_command=next_command(verdict, run))


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
            _is_lower_better(name, scoring),
        )
        for name in whole.delta
    }


def _is_lower_better(measure: str, scoring: AnswerScoring) -> bool:
    return scoring.own[measure].lower_is_better if measure in scoring.own else measure in LOWER_IS_BETTER


def _unknown_measure(chosen: str, changes: Mapping[str, MeasuredChange]) -> str:
    hint = did_you_mean(chosen, sorted(changes))
    there = ", ".join(changes)
    return f"evaluation.decide_by: '{chosen}' is not measured for both on these rows; there are: {there}.{hint}"


def _is_identical(comparison: ModelComparison) -> bool:
    """Whether no row's loss changed."""
    return LOSS in comparison.whole.delta and not comparison.improved and not comparison.worsened


def _with_reservations(verdict: Verdict) -> str:
    """The sentence; where it says `better`, with its reservations."""
    if verdict.outcome != "better":
        return verdict.sentence
    but = [remark.but for remark in verdict.remarks if remark.severity in ("problem", "warning") and remark.but]
    return f"{verdict.sentence.removesuffix('.')}; but {', and '.join(but)}." if but else verdict.sentence


def next_command(verdict: Verdict, run: str) -> str:
    """The next command to type; empty if there is no run to name."""
    if not run:
        return ""
    name = shlex.quote(run)
    codes = {remark.code for remark in verdict.remarks}
    if verdict.outcome == "inconclusive" and "decide_by=" in verdict.decide:
        measure = verdict.decide.partition("decide_by=")[2].partition(" ")[0]
        return f"training-lens compare --run {name} evaluation.decide_by={measure}"
    if verdict.outcome == "inconclusive" or (verdict.outcome == "better" and "thin_evidence" in codes):
        return f"training-lens compare --run {name} data.validation=FILE"
    if verdict.severity in ("problem", "warning") or verdict.outcome == "no difference":
        return f"training-lens report {name} --kind diagnostic"
    return f"training-lens merge --run {name}"
