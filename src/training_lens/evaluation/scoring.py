"""One model's outcome on rows, kept so that every measure of any subset or resample of the rows can be computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from training_lens.evaluation.evaluator import TokenSums
from training_lens.evaluation.metrics import CORPUS_METRICS, row_scores

Measures = dict[str, float]
Interval = tuple[float, float]
DRAWN_AT_ONCE = 2**22  # weights of resampled rows in memory: 32 MB


@dataclass(frozen=True)
class Scored:
    """What the measures are computed from; every array has the rows first.

    `text_bytes` are the UTF-8 bytes of each row's supervised text. `row_scores` are nan where a metric does not apply
    to a row; `statistics` are zero where a row asks for no answer. `kl` sums KL(p_base || p_adapter), None for a base.
    """

    sums: TokenSums
    text_bytes: np.ndarray
    row_scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    kl: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sums.nll)

    def with_answers(self, predictions: Sequence[str], references: Sequence[str], asked: np.ndarray) -> Scored:
        """With the scores of generated answers.

        Args:
            predictions, references: of the rows that `asked` (bool, (rows,)) marks, in their order.
        """
        if not asked.any():
            return self
        scores = row_scores(predictions, references)
        statistics = {name: m.statistics(predictions, references) for name, m in CORPUS_METRICS.items()}
        return Scored(
            self.sums,
            self.text_bytes,
            {name: _spread(values, asked, math.nan) for name, values in scores.items()},
            {name: _spread(values, asked, 0.0) for name, values in statistics.items()},
            self.kl,
        )

    def measures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure, once for each row of weights: {name: (draws,)}; nan where there is nothing to measure.

        With weights w over rows i: loss = sum w nll / sum w tokens, in nats per supervised token; perplexity =
        exp(loss); bits_per_token = loss / ln 2; bits_per_byte = sum w nll / (ln 2 sum w bytes), over the UTF-8 bytes
        of the supervised text, so that it compares across tokenizers (end tokens cost bits and have no bytes);
        token_accuracy = the share of supervised tokens that are the likeliest; forward_kl in nats per token. The
        other scores are weighted means over the rows that they apply to; bleu and chrf those of the weighted set.

        Args:
            weights: (draws, rows), how often each row counts.
        """
        nll, tokens = weights @ self.sums.nll, weights @ self.sums.tokens
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = {
                "loss": nll / tokens,
                "perplexity": np.exp(nll / tokens),
                "bits_per_token": nll / tokens / math.log(2),
                "bits_per_byte": nll / math.log(2) / (weights @ self.text_bytes),
                "token_accuracy": weights @ self.sums.correct / tokens,
            }
            if self.kl is not None:
                found["forward_kl"] = weights @ self.kl / tokens
            for name, values in self.row_scores.items():
                there = ~np.isnan(values)
                found[name] = weights @ np.nan_to_num(values) / (weights @ there)
        for name, statistics in self.statistics.items():
            score = CORPUS_METRICS[name].score
            found[name] = np.array([score(sums) if sums.any() else math.nan for sums in weights @ statistics])
        return found

    def of(self, rows: np.ndarray) -> Measures:
        """The measures of these rows (bool, (all rows,)); those that do not apply to any are left out."""
        weights = rows.astype(np.float64)[None]
        return {n: float(v[0]) for n, v in self.measures(weights).items() if math.isfinite(v[0])}


def _spread(values: np.ndarray, rows: np.ndarray, fill: float) -> np.ndarray:
    """The values of some rows in an array for all rows."""
    whole = np.full((len(rows), *values.shape[1:]), fill)
    whole[rows] = values
    return whole


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: `resamples` sets of rows with replacement, percentiles that leave `confidence` between.

    Efron's percentile bootstrap. Both models of a comparison are drawn with the same rows (paired), so that what makes
    rows hard for both cancels out.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def intervals(self, scored: Scored, rows: np.ndarray, minus: Scored | None = None) -> dict[str, Interval]:
        """The interval of every measure of `scored` on these rows, or of its difference from that of `minus`.

        Args:
            rows: bool, (all rows,). One row alone has no intervals.
        """
        chosen = np.flatnonzero(rows)
        if self.resamples == 0 or len(chosen) < 2:
            return {}
        parts = []
        for weights in self._weights(chosen, len(rows)):
            values = scored.measures(weights)
            if minus is not None:
                values = differences(values, minus.measures(weights))
            parts.append(values)
        drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        outside = 50 * (1 - self.confidence)
        kept = {n: v[np.isfinite(v)] for n, v in drawn.items()}
        return {
            n: (float(np.percentile(v, outside)), float(np.percentile(v, 100 - outside)))
            for n, v in kept.items()
            if len(v)
        }

    def _weights(self, chosen: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """(draws, rows) counts of resampled rows, some draws at a time."""
        generator = np.random.default_rng(self.seed)
        left, at_once = self.resamples, max(1, DRAWN_AT_ONCE // rows)
        while left > 0:
            draws = min(left, at_once)
            weights = np.zeros((draws, rows))
            weights[:, chosen] = generator.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), size=draws)
            yield weights
            left -= draws


def differences(values: Mapping[str, np.ndarray], of_base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Measure by measure, what is more than in the base; those of both alone."""
    return {name: value - of_base[name] for name, value in values.items() if name in of_base}
