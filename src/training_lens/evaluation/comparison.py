"""Models on the same rows: measures of the whole, by length and by domain, differences with intervals, rows that moved.

Pure scoring: what the models said comes in as values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from training_lens.data.types import Example
from training_lens.evaluation.length_bucketing import LengthBuckets
from training_lens.evaluation.scoring import Bootstrap, Interval, Measures, Scored

BASE, ADAPTER = "base", "adapter"
SHOWN = 5  # rows that moved most, each way


@dataclass(frozen=True)
class Group:
    """Some of the rows: the measures of each model on them.

    `delta` is adapter minus base where both are there, and `intervals` are those of the delta; of one model alone,
    `intervals` are those of its measures.
    """

    rows: int
    supervised_tokens: int
    models: Mapping[str, Measures]
    delta: Measures
    intervals: Mapping[str, Interval]

    def as_json(self) -> dict[str, Any]:
        counts = {"rows": self.rows, "supervised_tokens": self.supervised_tokens}
        delta = {"delta": self.delta} if len(self.models) > 1 else {}
        return {**counts, **self.models, **delta, "intervals": {n: list(v) for n, v in self.intervals.items()}}


@dataclass(frozen=True)
class Moved:
    """A row and its losses, in nats per supervised token of the row."""

    id: str
    base_loss: float
    adapter_loss: float


@dataclass(frozen=True)
class Control:
    """The adapter on changed prompts: what it should be worse on, if it uses what was changed."""

    rows: int
    scores: Measures


@dataclass(frozen=True)
class Forgetting:
    """Losses on text of the user's choice, in nats per token, before and after."""

    rows: int
    base_loss: float
    adapter_loss: float
    delta: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """Models on the same rows, whole and in parts; `models` says what `base` and `adapter` stand for.

    `tasks` are scores of lm-eval: model -> task -> metric -> value.
    """

    models: Mapping[str, str]
    whole: Group
    by_length: Mapping[str, Group]
    by_domain: Mapping[str, Group]
    confidence: float
    controls: Mapping[str, Control] = field(default_factory=dict)
    improved: Sequence[Moved] = ()
    worsened: Sequence[Moved] = ()
    forgetting: Forgetting | None = None
    tasks: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The object that `compare --json` prints."""
        return {
            "models": dict(self.models),
            **self.whole.as_json(),
            "confidence": self.confidence,
            "by_length": [{"tokens": label, **group.as_json()} for label, group in self.by_length.items()],
            "by_domain": {domain: group.as_json() for domain, group in self.by_domain.items()},
            "controls": {name: {"rows": c.rows, **c.scores} for name, c in self.controls.items()},
            "improved": [asdict(row) for row in self.improved],
            "worsened": [asdict(row) for row in self.worsened],
            "forgetting": asdict(self.forgetting) if self.forgetting else None,
            "tasks": {model: {task: dict(m) for task, m in found.items()} for model, found in self.tasks.items()},
        }


def compare(
    examples: Sequence[Example],
    lengths: np.ndarray,
    models: Mapping[str, Scored],
    buckets: LengthBuckets,
    bootstrap: Bootstrap,
    described: Mapping[str, str],
) -> Comparison:
    """Score one model, or two on the same rows: `base` and `adapter`.

    Args:
        lengths: tokens of each row, (rows,).
        described: what the models are, for people.
    """
    bucket = buckets.assign(lengths)
    domains = np.array([e.domain for e in examples], dtype=object)
    every = np.ones(len(examples), dtype=bool)
    moved = _moved(examples, models) if len(models) == 2 else []
    return Comparison(
        described,
        _group(models, every, bootstrap),
        {
            label: _group(models, bucket == i, bootstrap)
            for i, label in enumerate(buckets.labels)
            if (bucket == i).any()
        },
        {
            d: _group(models, domains == d, bootstrap)
            for d in sorted({e.domain for e in examples if e.domain is not None})
        },
        bootstrap.confidence,
        improved=[row for row in moved[:SHOWN] if row.adapter_loss < row.base_loss],
        worsened=[row for row in moved[: -SHOWN - 1 : -1] if row.adapter_loss > row.base_loss],
    )


def _group(models: Mapping[str, Scored], rows: np.ndarray, bootstrap: Bootstrap) -> Group:
    first = next(iter(models.values()))
    found = {name: scored.of(rows) for name, scored in models.items()}
    delta: Measures = {}
    intervals = bootstrap.intervals(first, rows) if len(models) == 1 else {}
    if len(models) == 2:
        base, adapter = found[BASE], found[ADAPTER]
        delta = {name: value - base[name] for name, value in adapter.items() if name in base}
        drawn = bootstrap.intervals(models[ADAPTER], rows, minus=models[BASE])
        intervals = {name: interval for name, interval in drawn.items() if name in delta}
    return Group(int(rows.sum()), int(first.sums.tokens[rows].sum()), found, delta, intervals)


def _moved(examples: Sequence[Example], models: Mapping[str, Scored]) -> list[Moved]:
    """The rows in the order of their loss's change, the most improved first."""
    base, adapter = (models[name].sums.nll / models[name].sums.tokens for name in (BASE, ADAPTER))
    order = np.argsort(adapter - base, kind="stable")
    return [Moved(examples[i].id, float(base[i]), float(adapter[i])) for i in order]


def forgetting(base: Scored, adapter: Scored, bootstrap: Bootstrap) -> Forgetting:
    """The change of loss on rows of text that was not trained on."""
    every = np.ones(len(base), dtype=bool)
    before, after = base.of(every)["loss"], adapter.of(every)["loss"]
    interval = bootstrap.intervals(adapter, every, minus=base).get("loss")
    return Forgetting(len(base), before, after, after - before, interval)


def samples(examples: Sequence[Example], count: int) -> list[int]:
    """Positions of rows to show: one of each domain in turn, the first that are there; no picking by result."""
    taken: list[int] = []
    while len(taken) < min(count, len(examples)):
        seen = {examples[i].domain for i in taken} if len({e.domain for e in examples}) > len(taken) else set()
        taken.append(next(i for i, e in enumerate(examples) if i not in taken and e.domain not in seen))
    return taken
