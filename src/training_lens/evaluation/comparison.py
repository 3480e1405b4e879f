"""Two models on the same rows: measures of all rows, by length and by domain; differences with intervals.

Pure: the scores of the models come in as values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from training_lens.data.examples import Example
from training_lens.evaluation.answer_endings import Endings
from training_lens.evaluation.length_bucketing import LengthBuckets
from training_lens.evaluation.model_scores import Bootstrap, Interval, Measures, ModelScores
from training_lens.evaluation.verdict import ADAPTER_NAME

BASE, ADAPTER = "base", "adapter"
SHOWN = 5  # most improved rows, and as many most worsened ones


@dataclass(frozen=True)
class RowGroup:
    """The measures of each model on a group of rows.

    `delta` is adapter minus base, with its `intervals`; for a single model, `intervals` are those of its measures.
    Where two models tokenize the rows differently, measures per token have no delta. `supervised_tokens` are those of
    the last model.
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
class MovedRow:
    """A row with its losses, in nats per supervised token."""

    id: str
    base_loss: float
    adapter_loss: float


@dataclass(frozen=True)
class ControlResult:
    """The adapter on corrupted prompts, over the rows whose supervised tokens stay the same.

    `scores` are its measures there, `adapter` those on the same rows with their own prompts, `delta` the difference.
    """

    rows: int
    supervised_tokens: int
    scores: Measures
    adapter: Measures
    delta: Measures
    intervals: Mapping[str, Interval]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "intervals": {n: list(v) for n, v in self.intervals.items()}}


def compare_control(changed: ModelScores, adapter: ModelScores, bootstrap: Bootstrap) -> ControlResult:
    """The adapter on corrupted prompts against itself on the same rows with their own prompts."""
    delta, intervals = bootstrap.measure_change(changed, adapter)
    tokens = int(changed.sums.tokens.sum())
    return ControlResult(len(changed), tokens, changed.measure_all(), adapter.measure_all(), delta, intervals)


@dataclass(frozen=True)
class Forgetting:
    """Losses of base and adapter on text of the user's choice, in nats per token."""

    rows: int
    base_loss: float
    adapter_loss: float
    delta: float
    interval: Interval | None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "interval": list(self.interval) if self.interval else None}


@dataclass(frozen=True)
class ModelComparison:
    """One or two models on the same rows; `models` says what `base` and `adapter` are.

    `labels` name them in tables, where two runs are compared. `tasks` are scores of lm-eval: model -> task -> metric ->
    value. `endings` are how each model's answers end. `unscored` counts the rows that a measure leaves out, by
    measure and reason. `number_reading` says how numbers were read.
    """

    models: Mapping[str, str]
    whole: RowGroup
    by_length: Mapping[str, RowGroup]
    by_domain: Mapping[str, RowGroup]
    confidence: float
    controls: Mapping[str, ControlResult] = field(default_factory=dict)
    improved: Sequence[MovedRow] = ()
    worsened: Sequence[MovedRow] = ()
    forgetting: Forgetting | None = None
    tasks: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    endings: Mapping[str, Endings] = field(default_factory=dict)
    unscored: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    number_reading: str = ""

    @property
    def is_of_two_runs(self) -> bool:
        """Whether two runs are compared, so that `base` is another run."""
        return bool(self.labels)

    def model_label(self, model: str) -> str:
        """The name of a model in tables: `base`, `adapter`, or a run's name."""
        return self.labels.get(model, model)

    def model_subject(self, model: str) -> str:
        """The name of a model in a sentence."""
        return self.labels.get(model) or {ADAPTER: ADAPTER_NAME, BASE: "its base"}[model]

    def as_json(self) -> dict[str, Any]:
        """The object that `compare --json` prints."""
        return {
            "models": dict(self.models),
            **self.whole.as_json(),
            "confidence": self.confidence,
            "by_length": [{"tokens": label, **group.as_json()} for label, group in self.by_length.items()],
            "by_domain": {domain: group.as_json() for domain, group in self.by_domain.items()},
            "controls": {name: c.as_json() for name, c in self.controls.items()},
            "improved": [asdict(row) for row in self.improved],
            "worsened": [asdict(row) for row in self.worsened],
            "forgetting": self.forgetting.as_json() if self.forgetting else None,
            "tasks": {model: {task: dict(m) for task, m in found.items()} for model, found in self.tasks.items()},
            "labels": dict(self.labels),
            "endings": {model: endings.as_json() for model, endings in self.endings.items()},
            "unscored": {measure: dict(reasons) for measure, reasons in self.unscored.items()},
            "number_reading": self.number_reading,
        }


def compare_models(
    examples: Sequence[Example],
    lengths: np.ndarray,
    models: Mapping[str, ModelScores],
    buckets: LengthBuckets,
    bootstrap: Bootstrap,
    described: Mapping[str, str],
) -> ModelComparison:
    """Score one model, or two on the same rows: `base` and `adapter`.

    Args:
        lengths: tokens of each row, (rows,).
        described: a description of each model.
    """
    bucket = buckets.assign(lengths)
    domains = np.array([e.domain for e in examples], dtype=object)
    named = sorted({e.domain for e in examples if e.domain is not None})
    two = len(models) == 2 and models[ADAPTER].has_same_tokens(models[BASE])
    moved = _rank_rows(examples, models) if two else []
    labels = [(label, bucket == i) for i, label in enumerate(buckets.labels) if (bucket == i).any()]
    return ModelComparison(
        described,
        _measure_group(models, bootstrap),
        {label: _measure_group(_take_rows(models, rows), bootstrap) for label, rows in labels},
        {domain: _measure_group(_take_rows(models, domains == domain), bootstrap) for domain in named},
        bootstrap.confidence,
        improved=[row for row in moved[:SHOWN] if row.adapter_loss < row.base_loss],
        worsened=[row for row in moved[: -SHOWN - 1 : -1] if row.adapter_loss > row.base_loss],
    )


def _take_rows(models: Mapping[str, ModelScores], rows: np.ndarray) -> dict[str, ModelScores]:
    return {name: scored.take(rows) for name, scored in models.items()}


def _measure_group(models: Mapping[str, ModelScores], bootstrap: Bootstrap) -> RowGroup:
    last = models[list(models)[-1]]
    found = {name: scored.measure_all() for name, scored in models.items()}
    delta, intervals = (
        bootstrap.measure_change(models[ADAPTER], models[BASE])
        if len(models) == 2
        else ({}, bootstrap.measure_intervals(last))
    )
    return RowGroup(len(last), int(last.sums.tokens.sum()), found, delta, intervals)


def _rank_rows(examples: Sequence[Example], models: Mapping[str, ModelScores]) -> list[MovedRow]:
    """The rows by the change of their loss, the most improved first."""
    base, adapter = (models[name].sums.nll / models[name].sums.tokens for name in (BASE, ADAPTER))
    order = np.argsort(adapter - base, kind="stable")
    return [MovedRow(examples[i].id, float(base[i]), float(adapter[i])) for i in order]


def measure_forgetting(base: ModelScores, adapter: ModelScores, bootstrap: Bootstrap) -> Forgetting:
    """The change of the loss on other text."""
    delta, intervals = bootstrap.measure_change(adapter, base)
    before, after = base.measure_all()["loss"], adapter.measure_all()["loss"]
    return Forgetting(len(base), before, after, delta["loss"], intervals.get("loss"))


def choose_samples(examples: Sequence[Example], count: int) -> list[int]:
    """Indices of rows to show: the first of each domain in turn, never chosen by result."""
    taken: list[int] = []
    while len(taken) < min(count, len(examples)):
        seen = {examples[i].domain for i in taken} if len({e.domain for e in examples}) > len(taken) else set()
        taken.append(next(i for i, e in enumerate(examples) if i not in taken and e.domain not in seen))
    return taken
