"""Base against adapter on the same rows: loss and exact match, whole and by domain, with a control. Pure scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training_lens.data.types import Example
from training_lens.evaluation.evaluator import LossReport
from training_lens.evaluation.metrics import exact_match_rate


@dataclass(frozen=True)
class Scores:
    """One model on one set of rows: loss in nats per supervised token, share of exactly matching answers.

    Plain texts have no answers: `exact_match` leaves them out, and is None where there is nothing else.
    """

    loss: float
    exact_match: float | None


@dataclass(frozen=True)
class Comparison:
    """Base and adapter side by side.

    The controls are the adapter told a wrong domain, and told none; None where the rows have no domains.
    """

    rows: int
    base: Scores
    adapter: Scores
    wrong_domain: Scores | None
    no_domain: Scores | None
    by_domain: dict[str, dict[str, Scores]]

    def as_json(self) -> dict[str, Any]:
        """The object that `compare --json` prints."""
        base, adapter = self.base.exact_match, self.adapter.exact_match
        gained = None if base is None or adapter is None else adapter - base
        return {**asdict(self), "delta": asdict(Scores(self.adapter.loss - self.base.loss, gained))}


@dataclass(frozen=True)
class Answers:
    """What one model said to every row, in the rows' order, and its loss on them."""

    texts: Sequence[str]
    loss: LossReport


def compare(
    examples: Sequence[Example], base: Answers, adapter: Answers, controls: Mapping[str, Answers]
) -> Comparison:
    """Score the answers of base and adapter against the rows' own; `controls`: wrong_domain and no_domain, if any."""
    references = [e.messages[-1].text for e in examples]

    def scores(answers: Answers, domain: str | None = None) -> Scores:
        chosen = [i for i, e in enumerate(examples) if not e.is_text and domain in (None, e.domain)]
        rate = exact_match_rate([answers.texts[i] for i in chosen], [references[i] for i in chosen])
        return Scores(answers.loss.loss if domain is None else answers.loss.by_domain[domain], rate)

    domains = sorted({e.domain for e in examples if e.domain is not None})
    control = {name: scores(answers) for name, answers in controls.items()}
    return Comparison(
        len(examples),
        scores(base),
        scores(adapter),
        control.get("wrong_domain"),
        control.get("no_domain"),
        by_domain={d: {"base": scores(base, d), "adapter": scores(adapter, d)} for d in domains},
    )


def wrong_domains(examples: Sequence[Example]) -> list[str]:
    """For each row another domain than its own: the next one in the order of names. Needs two domains or more."""
    names = sorted({e.domain for e in examples if e.domain is not None})
    return [names[(names.index(e.domain) + 1) % len(names)] if e.domain else "" for e in examples]


def samples(examples: Sequence[Example], count: int) -> list[int]:
    """Positions of rows to show: one of each domain in turn, the first that are there; no picking by result."""
    taken: list[int] = []
    while len(taken) < min(count, len(examples)):
        seen = {examples[i].domain for i in taken} if len({e.domain for e in examples}) > len(taken) else set()
        taken.append(next(i for i, e in enumerate(examples) if i not in taken and e.domain not in seen))
    return taken
