"""Two models on the same rows: measures of all rows, by length and by domain; differences with intervals; controls.

A control is corrupted prompts over the same answers: what the adapter loses shows how much it uses the prompt.
Pure: the scores of the models come in as values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, pairwise
from typing import Any

import numpy as np

from training_lens.data.examples import Example
from training_lens.errors import ConfigurationError
from training_lens.evaluation.answer_endings import Endings
from training_lens.evaluation.evaluation_rows import UNKNOWN_ROWS, TrainedRows
from training_lens.evaluation.model_scores import Bootstrap, Measures, ModelScores
from training_lens.evaluation.verdict import ADAPTER_NAME, Interval

BASE, ADAPTER = "base", "adapter"
WRONG_DOMAIN, NO_DOMAIN, SHUFFLED_PROMPTS = "wrong_domain", "no_domain", "shuffled_prompts"
NEW_ROWS, TRAINED_ROWS = "not in training", "in training"
SHOWN = 5  # most improved rows, and as many most worsened ones


@dataclass(frozen=True)
class RowGroup:
    """The measures of each model on a group of rows, of which `leaked` are training rows, too.

    `delta` is adapter minus base, with its `intervals`; for a single model, `intervals` are those of its measures.
    Where two models tokenize the rows differently, measures per token have no delta. `supervised_tokens` are those of
    the last model.
    """

    rows: int
    supervised_tokens: int
    models: Mapping[str, Measures]
    delta: Measures
    intervals: Mapping[str, Interval]
    leaked: int = 0

    def as_json(self) -> dict[str, Any]:
        counts = {"rows": self.rows, "supervised_tokens": self.supervised_tokens, "leaked": self.leaked}
        delta = {"delta": self.delta} if len(self.models) > 1 else {}
        return {**counts, **self.models, **delta, "intervals": self.intervals}


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


@dataclass(frozen=True)
class ModelComparison:
    """One or two models on the same rows; `models` says what `base` and `adapter` are.

    `labels` name them in tables, where two runs are compared. `tasks` are scores of lm-eval: model -> task -> metric ->
    value. `endings` are how each model's answers end. `unscored` counts the rows that a measure leaves out, by
    measure and reason. `number_reading` says how numbers were read. `trained` says which rows are training rows, too;
    `by_leak` has the others and these apart, where there are any.
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
    trained: TrainedRows = UNKNOWN_ROWS
    by_leak: Mapping[str, RowGroup] = field(default_factory=dict)

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
        plain = asdict(replace(self, trained=UNKNOWN_ROWS))
        del plain["whole"], plain["trained"]
        return {
            "models": plain.pop("models"),
            **self.whole.as_json(),
            **plain,
            "leaks": self.trained.as_json(),
            "by_leak": {label: group.as_json() for label, group in self.by_leak.items()},
            "by_length": [{"tokens": label, **group.as_json()} for label, group in self.by_length.items()],
            "by_domain": {domain: group.as_json() for domain, group in self.by_domain.items()},
        }


@dataclass(frozen=True)
class LengthBuckets:
    """Consecutive ranges of lengths in tokens, from 1 up: each example falls into exactly one.

    `limits` are the longest length of each range, ascending. One more bucket takes what is longer than the last limit,
    so every length has a bucket; without limits, there is one bucket for all.

    Example:
        >>> buckets = LengthBuckets.from_limits([64, 128])
        >>> buckets.labels, buckets.assign(np.array([1, 64, 65, 900])).tolist()
        (('1-64', '65-128', 'over 128'), [0, 0, 1, 2])
    """

    limits: tuple[int, ...]

    @classmethod
    def from_quantiles(cls, lengths: np.ndarray, count: int) -> LengthBuckets:
        """At most `count` buckets of nearly equal size; none is empty.

        The limits are the lengths nearest to i/count of the examples, i = 1 .. count - 1. Equal lengths share a bucket,
        so there may be fewer buckets. The last bucket has no upper limit.

        Example:
            >>> LengthBuckets.from_quantiles(np.array([5, 6, 7, 8, 20, 90]), 3).labels
            ('1-6', '7-8', 'over 8')
        """
        values, examples = np.unique(lengths, return_counts=True)
        cuts = np.cumsum(examples)[:-1]  # examples up to each length; none are longer than the longest
        if not len(cuts):
            return cls(())
        ideal = len(lengths) * np.arange(1, count) / count
        nearest = np.abs(cuts[:, None] - ideal).argmin(axis=0)  # (lengths, count - 1) -> (count - 1,)
        return cls(tuple(np.unique(values[nearest]).tolist()))

    @classmethod
    def from_limits(cls, limits: Sequence[int]) -> LengthBuckets:
        """Buckets up to the given lengths in tokens, inclusive, and one for what is longer.

        Raises:
            ConfigurationError: the limits are empty, not all positive, or not ascending.
        """
        if not limits or limits[0] < 1 or any(after <= before for before, after in pairwise(limits)):
            raise ConfigurationError(
                f"evaluation.length_buckets: {list(limits)} are no bucket limits; give lengths in tokens from 1 "
                "up, each greater than the one before, such as [64,128,512]."
            )
        return cls(tuple(limits))

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each bucket: '65-128', '7' for a single length, 'over 128' for the last."""
        if not self.limits:
            return ("all",)
        ranges = [(before + 1, limit) for before, limit in pairwise((0, *self.limits))]
        closed = [f"{low}-{high}" if low < high else f"{high}" for low, high in ranges]
        return (*closed, f"over {self.limits[-1]}")

    def assign(self, lengths: np.ndarray) -> np.ndarray:
        """The bucket of each example, an index into `labels`: (examples,) int64."""
        return np.searchsorted(np.array(self.limits, dtype=np.int64), lengths, side="left").astype(np.int64)


def compare_models(
    examples: Sequence[Example],
    lengths: np.ndarray,
    models: Mapping[str, ModelScores],
    buckets: LengthBuckets,
    bootstrap: Bootstrap,
    described: Mapping[str, str],
    trained: TrainedRows = UNKNOWN_ROWS,
) -> ModelComparison:
    """Score one model, or two (`base` and `adapter`) on the same rows, of `lengths` (rows,) in tokens."""
    leaked = np.zeros(len(examples), dtype=bool) if trained.leaked is None else trained.leaked

    def measure_part(rows: np.ndarray) -> RowGroup:
        group = _measure_group({name: scored.take(rows) for name, scored in models.items()}, bootstrap)
        return replace(group, leaked=int(leaked[rows].sum()))

    bucket, domains = buckets.assign(lengths), np.array([e.domain for e in examples], dtype=object)
    moved: list[MovedRow] = []  # the most improved first
    if len(models) == 2 and models[ADAPTER].has_same_tokens(models[BASE]):
        base, adapter = (models[name].sums.nll / models[name].sums.tokens for name in (BASE, ADAPTER))
        order = np.argsort(adapter - base, kind="stable")
        moved = [MovedRow(examples[i].id, float(base[i]), float(adapter[i])) for i in order]
    return ModelComparison(
        described,
        replace(_measure_group(models, bootstrap), leaked=int(leaked.sum())),
        {label: measure_part(bucket == i) for i, label in enumerate(buckets.labels) if (bucket == i).any()},
        {d: measure_part(domains == d) for d in sorted({e.domain for e in examples if e.domain is not None})},
        bootstrap.confidence,
        improved=[row for row in moved[:SHOWN] if row.adapter_loss < row.base_loss],
        worsened=[row for row in moved[: -SHOWN - 1 : -1] if row.adapter_loss > row.base_loss],
        trained=trained,
        by_leak={
            label: measure_part(rows)
            for label, rows in ((NEW_ROWS, ~leaked), (TRAINED_ROWS, leaked))
            if leaked.any() and rows.any()
        },
    )


def _measure_group(models: Mapping[str, ModelScores], bootstrap: Bootstrap) -> RowGroup:
    *before, last = models.values()
    found = {name: scored.measure_all() for name, scored in models.items()}
    delta, intervals = bootstrap.measure_change(last, *before) if before else ({}, bootstrap.measure_intervals(last))
    return RowGroup(len(last), int(last.sums.tokens.sum()), found, delta, intervals)


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


def corrupt_prompts(examples: Sequence[Example], domain_in_prompt: bool, seed: int) -> dict[str, dict[int, Example]]:
    """The corrupted rows of each control, by the index of the original row; those of domains need two of them."""
    changed: dict[str, dict[int, Example]] = {}
    with_domain = {i: e for i, e in enumerate(examples) if e.domain is not None}
    if domain_in_prompt and len({e.domain for e in with_domain.values()}) > 1:
        wrong = wrong_domains(list(with_domain.values()))
        changed[WRONG_DOMAIN] = {i: replace(with_domain[i], domain=d) for i, d in zip(with_domain, wrong, strict=True)}
        changed[NO_DOMAIN] = {i: replace(e, domain=None) for i, e in with_domain.items()}
    prompted = {i: e for i, e in enumerate(examples) if not e.is_text}
    if len(prompted) > 1:
        shuffled = zip(prompted, shuffled_prompts(list(prompted.values()), seed), strict=True)
        changed[SHUFFLED_PROMPTS] = {i: e for i, e in shuffled if e != prompted[i]}  # an unchanged prompt is no control
    return {name: rows for name, rows in changed.items() if rows}


def wrong_domains(examples: Sequence[Example]) -> list[str]:
    """For each row the next domain in the order of names; every row has a domain, and there are at least two."""
    names = sorted({str(e.domain) for e in examples})
    return [names[(names.index(str(e.domain)) + 1) % len(names)] for e in examples]


def shuffled_prompts(examples: Sequence[Example], seed: int) -> list[Example]:
    """Each row with the user messages of another row, drawn at random; no row keeps its own.

    The other messages stay: answers, tool calls and their results, the system message.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # one cycle through all of them
    shuffled = []
    for i, example in enumerate(examples):
        turns = cycle([m for m in examples[other[i]].messages if m.role == "user"])  # repeated as often as needed
        messages = tuple(next(turns, m) if m.role == "user" else m for m in example.messages)
        shuffled.append(replace(example, messages=messages))
    return shuffled
