"""What test runs with one changed setting measured: the file that they leave, and how it decides a finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from training_lens.analysis.findings.finding import Confidence, Finding, Rule
from training_lens.display.html import Severity
from training_lens.errors import DamagedFileError
from training_lens.measures.curves import NORMAL_95
from training_lens.utils.integrity import read_sealed, write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
FILE = "interventions.json"
Question = Literal["rate", "rank", "targets", "epoch"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
ANSWERED_BY: dict[str, Question] = {  # code of a finding -> the question
    "rate_low": "rate", "rate_high": "rate", "rank": "rank", "targets": "targets", "converged": "epoch",
}  # fmt: skip
LONG_ENOUGH = 0.25  # of the run's steps
MATTERS = 0.05  # of the adapter's gain over the base
THRESHOLD = f"a 95% interval below 0, and a difference of at least {MATTERS:.0%} of the gain over the base"
HARMLESS = 0.02  # of the gain
STUDENT_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # standard errors of a 95 % interval, by degrees of freedom


@dataclass(frozen=True)
class SettingChange:
    """What one changed setting does to the held-out loss: changed minus unchanged, in nats per supervised token.

    `setting` is as typed: `training.lr=0.009`. `deltas` has one difference for each seed, `delta` their mean, `low` to
    `high` its 95 % interval. They are empty and None where a changed run failed, for the reason in `failure`.
    """

    name: str
    setting: str
    deltas: tuple[float, ...] = ()
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    failure: str = ""

    def describe(self) -> str:
        """The change and its effect in a few words."""
        if self.delta is None:
            return f"{self.setting} fails: {self.failure}"
        return f"{self.setting} changes the loss by {self.delta:+.3g} ({self.low:+.2g} to {self.high:+.2g})"


@dataclass(frozen=True)
class Intervention:
    """The answer to one question: test runs of `steps` steps, with a setting changed and without.

    `total_steps` is the run's length, `seeds` are those of the test runs. `loss` is that of the unchanged runs on
    `rows` validation rows (mean over seeds), `base_loss` the base's, in nats per supervised token. `tokens` and
    `seconds` are the cost of all test runs.
    """

    question: Question
    steps: int
    total_steps: int
    seeds: tuple[int, ...]
    rows: int
    base_loss: float
    loss: float
    changes: tuple[SettingChange, ...]
    tokens: int = 0
    seconds: float = 0.0

    @property
    def gain(self) -> float:
        """The largest gain over the base, of the unchanged or a changed run."""
        return max(
            0.0, self.base_loss - self.loss - min([0.0, *(c.delta for c in self.changes if c.delta is not None)])
        )

    @property
    def least_steps(self) -> int:
        """Steps of a test run that can decide: a quarter of the run's, and the whole of an added epoch."""
        return self.total_steps if self.question == "epoch" else ceil(LONG_ENOUGH * self.total_steps)

    @property
    def is_long_enough(self) -> bool:
        """Whether the test runs have at least `least_steps`."""
        return self.steps >= self.least_steps

    @property
    def confidence(self) -> Confidence:
        """Runs as long as the whole one, or as the added epoch, leave nothing to guess."""
        return "sure" if self.steps >= self.total_steps else "likely"

    def find_change(self, name: str) -> SettingChange | None:
        """The change of this name; None if it was not measured."""
        return next((change for change in self.changes if change.name == name), None)

    def is_better(self, change: SettingChange) -> bool:
        """Whether the change lowers the loss for sure, and by enough to act on."""
        return (
            change.delta is not None and change.high is not None
            and change.high < 0 and -change.delta >= MATTERS * self.gain
        )  # fmt: skip

    def excludes_gain(self, change: SettingChange) -> bool:
        """Whether the change surely does not lower the loss by enough to act on; a failed run does not."""
        return change.low is None or change.low > -MATTERS * self.gain

    def is_harmless(self, change: SettingChange) -> bool:
        """Whether the change surely does not raise the loss by enough to matter."""
        return change.high is not None and change.high < HARMLESS * self.gain

    def describe(self, *names: str) -> str:
        """The named changes (all by default) and what they rest on, in one sentence."""
        known = [change.describe() for change in self.changes if not names or change.name in names]
        if not known:
            return "this run has nothing to change"
        return (
            f"{'; '.join(known)}, measured on {self.rows} validation rows after {self.steps} of {self.total_steps} "
            f"steps with {len(self.seeds)} seeds; the gain over the base is {self.gain:.3g} nats per token"
        )


def measure_changes(
    changes: Mapping[str, str], control: np.ndarray, changed: Mapping[str, np.ndarray | str], tokens: np.ndarray
) -> tuple[SettingChange, ...]:
    """The effect of each change, with its 95 % interval.

    The variance of the mean difference has two parts: over rows, by the ratio estimator (Cochran 1977, section 2.11)
    of the seeds' mean; and over seeds, pooled over the changes, with Student's t for its few degrees of freedom.

    Args:
        changes: names of the changes and their settings.
        control: (seeds, rows) summed losses of the unchanged runs.
        changed: by name, those of the changed runs; or why one of them failed.
        tokens: (rows,) supervised tokens.
    """
    differences = {name: nll - control for name, nll in changed.items() if not isinstance(nll, str)}
    by_seed = {name: rows.sum(1) / tokens.sum() for name, rows in differences.items()}
    freedom = len(by_seed) * (len(control) - 1)
    pooled = float(np.mean([deltas.var(ddof=1) for deltas in by_seed.values()])) if freedom else 0.0
    of_seeds = STUDENT_95.get(freedom, STUDENT_95[4]) ** 2 * pooled / len(control) if freedom else 0.0
    found = []
    for name, setting in changes.items():
        if name not in differences:
            found.append(SettingChange(name, setting, failure=str(changed[name])))
            continue
        delta, rows = float(by_seed[name].mean()), differences[name].mean(0)
        spread = np.square(rows - delta * tokens).sum() * len(rows) / max(1, len(rows) - 1)
        half = float(np.sqrt(NORMAL_95**2 * spread / tokens.sum() ** 2 + of_seeds))
        found.append(SettingChange(name, setting, tuple(by_seed[name].tolist()), delta, delta - half, delta + half))
    return tuple(found)


def write_interventions(lens_folder: Path, measured: Sequence[Intervention]) -> Path:
    """Save answers as `interventions.json` beside the captures, in place of earlier ones to the same questions."""
    known = {each.question: each for each in (*read_interventions(lens_folder).values(), *measured)}
    lens_folder.mkdir(parents=True, exist_ok=True)
    write_sealed(lens_folder / FILE, {name: asdict(each) for name, each in known.items()})
    return lens_folder / FILE


def read_interventions(folder: Path) -> dict[Question, Intervention]:
    """The answers in a run folder or lens folder by question; none, with a warning, if the file is unreadable."""
    path = next((p for p in (folder / FILE, folder / "lens" / FILE) if p.is_file()), None)
    if path is None:
        return {}
    try:
        return {name: _parse_intervention(values) for name, values in read_sealed(path).items() if name in QUESTIONS}
    except (OSError, DamagedFileError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read (%s) and is ignored; measure it again with analyze --test", path, error)
        return {}


def _parse_intervention(values: Mapping[str, Any]) -> Intervention:
    changes = tuple(SettingChange(**{**each, "deltas": tuple(each["deltas"])}) for each in values["changes"])
    return Intervention(**{**values, "seeds": tuple(values["seeds"]), "changes": changes})


@dataclass(frozen=True)
class Claim:
    """What a finding says of a change once it is measured.

    `better`, `open` and `fine` are its titles where the change lowers the loss, may lower it, and does not; `action` is
    what to do in the first case. Test runs shorter than `Intervention.least_steps` are biased (a shorter run likes
    higher rates, smaller ranks and fewer modules, and a part of an epoch gains less): `trusts_short_gain` and
    `trusts_short_loss` say which outcomes hold anyway.
    """

    question: Question
    change: str
    better: str
    open: str
    fine: str
    action: str
    trusts_short_gain: bool
    trusts_short_loss: bool
    severity: Severity = "warning"


def decide_finding(rule: Rule, finding: Finding, measured: Mapping[Question, Intervention], claim: Claim) -> Finding:
    """The finding by the test runs, in place of the one by the run's own curves; without test runs, that one.

    An undecided finding names the command that decides it. A `problem` stays: the run itself shows it.
    """
    intervention = measured.get(claim.question)
    change = intervention.find_change(claim.change) if intervention else None
    if intervention is None or change is None:
        return name_test(finding, claim.question)
    rule = replace(rule, threshold=THRESHOLD, source="test runs with one setting changed, on this run's own rows")
    text, evidence = intervention.describe(claim.change), {**finding.evidence, "intervention": asdict(intervention)}
    is_better = intervention.is_better(change)
    if finding.severity == "problem" and not is_better:
        return replace(finding, measured=f"{finding.measured}; {text}", evidence=evidence)
    if not (intervention.is_long_enough or (claim.trusts_short_gain if is_better else claim.trusts_short_loss)):
        steps = f"--test-steps {intervention.least_steps}"
        decide = f"training-lens analyze RUN --test {claim.question} {steps}: these runs are too short"
        return rule.report_inconclusive(claim.open, f"{finding.measured}; {text}", decide, evidence)
    if is_better and (faster := _find_higher_rate(measured, claim, change)):
        decide = (
            f"the same test of a run with {faster.setting}, which gains more ({faster.delta:+.3g}): at a rate that is "
            "too low, whatever learns faster gains"
        )
        return rule.report_inconclusive(claim.open, text, decide, evidence)
    if is_better:
        action = claim.action.format(setting=change.setting)
        confidence = intervention.confidence
        return rule.report_symptom(
            claim.severity, claim.better, text, action=action, confidence=confidence, evidence=evidence
        )
    if not intervention.excludes_gain(change):
        decide = "the same test with more steps (--test-steps), or a run with more validation rows"
        return rule.report_inconclusive(claim.open, f"{finding.measured}; {text}: within the noise", decide, evidence)
    return rule.report_fine(claim.fine, text, intervention.confidence, evidence)


def _find_higher_rate(
    measured: Mapping[Question, Intervention], claim: Claim, change: SettingChange
) -> SettingChange | None:
    """The higher rate, if it is better and gains more than a larger rank or more modules, which learn faster, too."""
    rate = measured.get("rate") if claim.question in ("rank", "targets") else None
    higher = rate.find_change("higher") if rate else None
    if rate is None or higher is None or higher.delta is None or change.delta is None or not rate.is_better(higher):
        return None
    return higher if higher.delta < change.delta else None


def list_open_questions(findings: Sequence[Finding]) -> tuple[Question, ...]:
    """The questions whose answers would decide a finding that is inconclusive."""
    wanted = {
        ANSWERED_BY[found.code] for found in findings if found.confidence == "inconclusive" if found.code in ANSWERED_BY
    }
    return tuple(question for question in QUESTIONS if question in wanted)


def name_test(finding: Finding, question: Question) -> Finding:
    """The finding; if it is inconclusive, with the command that measures the answer."""
    if finding.confidence != "inconclusive":
        return finding
    return replace(finding, decide=f"training-lens analyze RUN --test {question}; or {finding.decide}")
