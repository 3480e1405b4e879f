"""The verdict of a comparison: a sentence backed by its evidence, remarks, and the next command.

Pure: measures come in as values. `compare`, reports and the end of training show the same verdict.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from training_lens.display.html import Severity
from training_lens.utils.formatting import pluralize

Outcome = Literal["better", "worse", "no difference", "inconclusive"]
Interval = tuple[float, float]

SEVERITIES: Mapping[Outcome, Severity] = {
    "better": "fine",
    "no difference": "note",
    "inconclusive": "note",
    "worse": "problem",
}
ORDER: tuple[Severity, ...] = ("problem", "warning", "note", "fine")
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_token", "bits_per_byte", "forward_kl")
PERCENT_MEASURES = (
    *("token_accuracy", "exact_match", "token_f1", "rouge1", "rouge2", "rougeL"),
    *("json_valid", "json_fields", "numeric"),
)
SET_SCORES = ("bleu", "chrf")  # from 0 to 100

# A smaller change does not matter; an interval within this margin means no difference.
LEAST_CHANGE = 0.01  # share of the value before
LEAST_SHARE, LEAST_SET_SCORE = 0.02, 1.0
ADAPTER_NAME = "the adapter"  # not named where it is the subject
THIN_ROWS = 30  # with fewer, a bootstrap interval is itself unreliable


@dataclass(frozen=True)
class Remark:
    """A remark on the verdict; `code` is for programs, `but` is the reservation for the headline."""

    code: str
    severity: Severity
    sentence: str
    but: str = ""


@dataclass(frozen=True)
class MeasuredChange:
    """One measure of two models on the same rows; `change` is after minus before, `interval` that of the change."""

    measure: str
    before: float
    after: float
    interval: Interval | None
    rows: int
    confidence: float = 0.95
    lower_is_better: bool = True

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def margin(self) -> float:
        """The change that is too small to matter."""
        if self.measure in PERCENT_MEASURES:
            return LEAST_SHARE
        return LEAST_SET_SCORE if self.measure in SET_SCORES else LEAST_CHANGE * abs(self.before)

    @property
    def least_rows(self) -> int:
        """With fewer rows, even a change of the same sign in all of them could be chance (sign test): 6 at 95 %."""
        return math.ceil(1 - math.log2(1 - self.confidence))

    def outcome(self) -> Outcome:
        """The outcome by where the interval lies: beyond zero, within the margin, or neither."""
        if self.interval is None or self.rows < self.least_rows:
            return "inconclusive"
        low, high = self.interval  # below, with the sign that more is better
        if low == high and self.measure in PERCENT_MEASURES:  # no row differs: the rule of three
            low, high = low - 3 / self.rows, high + 3 / self.rows
        low, high = (-high, -low) if self.lower_is_better else (low, high)
        if -self.margin <= low and high <= self.margin:
            return "no difference"
        return "better" if low > 0 else "worse" if high < 0 else "inconclusive"

    def rows_needed(self) -> int | None:
        """About how many rows would decide, if the change stays the same; None where that is unrealistic."""
        if self.interval is None or self.change == 0:
            return None
        half = (self.interval[1] - self.interval[0]) / 2
        needed = self.rows * (half / max(abs(self.change), self.margin)) ** 2
        return math.ceil(needed) if self.rows < needed < 1e6 else None

    def describe_change(self) -> str:
        """'loss 2.9394 against 7.1036, a change of -4.1642 (95% interval -4.3148 to -4.0262)'."""
        after, before = self.format_value(self.after), self.format_value(self.before)
        ends = [self.format_value(end, "+") for end in self.interval or ()]
        between = f"{self.confidence:.0%} interval {' to '.join(ends)}" if ends else "no interval"
        return f"{after} against {before}, {self.format_value(self.change, '+')} ({between})"

    def format_value(self, value: float, sign: str = "") -> str:
        return format_measure(self.measure, value, sign)


def format_measure(measure: str, value: float, sign: str = "") -> str:
    """A measure's value for people: shares in percent, all else as a number."""
    if measure in PERCENT_MEASURES:
        return f"{value:{sign}.1%}"
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign}.4g}"


def name_measure(measure: str) -> str:
    return measure.replace("_", " ")


@dataclass(frozen=True)
class Verdict:
    """The answer to "is it better?".

    `basis`: `comparison` (rows evaluated one by one, with an interval) or `training` (means of the run's validation).
    `measure`, `change`, `interval` and `rows` are those of the deciding measure; `decide` is what would settle an
    inconclusive verdict; `next_command` can be typed as it is.
    """

    outcome: Outcome
    sentence: str
    basis: Literal["comparison", "training"]
    measure: str | None = None
    change: float | None = None
    interval: Interval | None = None
    rows: int = 0
    remarks: tuple[Remark, ...] = ()
    decide: str = ""
    next_command: str = ""

    @property
    def severity(self) -> Severity:
        """The highest severity of the outcome and of its warnings."""
        warnings = (remark.severity for remark in self.remarks if remark.severity in ("problem", "warning"))
        return min((SEVERITIES[self.outcome], *warnings), key=ORDER.index)

    def text_lines(self) -> list[str]:
        """The printed lines: the sentence, remarks, what would decide, the next command."""
        lines = [self.sentence, *(f"- {remark.sentence}" for remark in self.remarks)]
        lines += [f"- What would decide: {self.decide}"] if self.decide else []
        return [*lines, f"Next: {self.next_command}"] if self.next_command else lines

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """The verdict that `as_json` gave.

        Raises:
            KeyError, TypeError: the values are not those of a verdict.
        """
        fields = {name: value for name, value in values.items() if name != "severity"}
        fields["remarks"] = tuple(Remark(**remark) for remark in values["remarks"])
        interval = values["interval"]
        fields["interval"] = (float(interval[0]), float(interval[1])) if interval else None
        return cls(**fields)


def next_command(verdict: Verdict, run: str) -> str:
    """The next command to type after a comparison; empty if there is no run to name."""
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


def assess_changes(
    deciding: MeasuredChange,
    others: Sequence[MeasuredChange],
    names: tuple[str, str],
    *,
    is_chosen: bool = False,
    is_identical: bool = False,
) -> Verdict:
    """The verdict by one measure, checked against other scores of the answers.

    Where the user chose no measure and another one contradicts the loss, the verdict is inconclusive. Where the user
    chose one, it decides, and measures that contradict it are remarks.

    Args:
        names: what is evaluated, and what it is compared with: ("the adapter", "its base").
        is_chosen: whether the user chose the deciding measure.
        is_identical: whether both give every supervised token the same probability.
    """
    outcome = "no difference" if is_identical else deciding.outcome()
    verdict = Verdict(
        outcome,
        _write_sentence(outcome, deciding, names, is_identical),
        "comparison",
        deciding.measure,
        deciding.change,
        deciding.interval,
        deciding.rows,
        decide=_what_decides(deciding) if outcome == "inconclusive" else "",
    )
    opposite = [other for other in others if {outcome, other.outcome()} == {"better", "worse"}]
    if opposite and not is_chosen:
        return _report_disagreement(verdict, deciding, opposite[0], names)
    remarks, agreeing = [], []
    for other in others:
        measure, found = name_measure(other.measure), other.outcome()
        if found == outcome and found in ("better", "worse"):
            agreeing.append(Remark("other_measure", "fine", f"So it is by {measure}: {other.describe_change()}."))
        elif found in ("better", "worse"):
            severity: Severity = "warning" if found == "worse" else "note"
            sentence = f"By {measure} it is {found}: {other.describe_change()}."
            remarks.append(Remark("other_measure", severity, sentence))
    return replace(verdict, remarks=(*remarks, *agreeing[:1]))


def _write_sentence(outcome: Outcome, change: MeasuredChange, names: tuple[str, str], is_identical: bool) -> str:
    it, other = names
    by = f"by {name_measure(change.measure)}"
    rows = f"on {pluralize(change.rows, 'row')}"
    if is_identical:
        return f"No difference: {it} and {other} give every supervised token the same probability, {rows}."
    if outcome == "no difference":
        return f"No difference that matters between {it} and {other} {by}: {change.describe_change()}, {rows}."
    if outcome == "inconclusive":
        return f"Inconclusive: these rows do not tell {it} from {other} {by}: {change.describe_change()}, {rows}."
    result = f"{outcome.capitalize()} than {other}" if it == ADAPTER_NAME else f"{it} is {outcome} than {other}"
    return f"{result} {by}: {change.describe_change()}, {rows}."


def _what_decides(change: MeasuredChange) -> str:
    if change.rows < change.least_rows:
        return f"at least {change.least_rows} rows: with fewer, every row could have changed the same way by chance."
    if change.interval is None:
        return "an interval: evaluation.resamples above 0, and more than one row."
    needed = change.rows_needed()
    about = f"about {needed:,} rows, if the change stays as it is" if needed else "many more rows"
    return f"{about} (data.validation=FILE, or a larger evaluation.max_examples)."


def _report_disagreement(
    verdict: Verdict, change: MeasuredChange, other: MeasuredChange, names: tuple[str, str]
) -> Verdict:
    first, second = verdict.outcome, other.outcome()
    sentence = (
        f"Inconclusive: {names[0]} is {first} than {names[1]} by {name_measure(change.measure)} "
        f"({change.describe_change()}), but {second} by {name_measure(other.measure)} ({other.describe_change()}), "
        f"on {pluralize(change.rows, 'row')}."
    )
    choices = f"evaluation.decide_by={other.measure} or evaluation.decide_by={change.measure}"
    decide = f"which of the two counts for you: {choices}."
    return replace(verdict, outcome="inconclusive", sentence=sentence, decide=decide)
