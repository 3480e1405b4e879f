"""One model's scores by row, from which the measures of any subset or resample of the rows are computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from training_lens.evaluation.evaluator import TokenSums
from training_lens.evaluation.metrics import CORPUS_METRICS, AnswerScoring, row_scores
from training_lens.evaluation.verdict import Interval

Measures = dict[str, float]
PER_TOKEN = ("loss", "perplexity", "bits_per_token", "token_accuracy")  # not comparable across tokenizers
DRAWN_AT_ONCE = 2**22  # weights of resampled rows in memory: 32 MB


@dataclass(frozen=True)
class ModelScores:
    """The scores that measures are computed from; the first axis of every array is the rows.

    `text_bytes` are the UTF-8 bytes of each row's supervised text, `tokens_id` is a hash of its supervised tokens.
    `row_scores` are nan where a metric does not apply to a row; `statistics` are zero where a row has no prompt or a
    metric does not apply. `kl` sums KL(p_base || p_adapter) over a row; it is None for a base.
    """

    sums: TokenSums
    text_bytes: np.ndarray
    tokens_id: np.ndarray
    row_scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    kl: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sums.nll)

    def with_answers(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        asked: np.ndarray,
        scoring: AnswerScoring | None = None,
    ) -> ModelScores:
        """These scores with those of generated answers to the rows that `asked` (rows,) bool marks, in their order."""
        if not asked.any():
            return self
        scoring = scoring or AnswerScoring()
        scores = row_scores(predictions, references, scoring)
        statistics = {
            name: metric.row_statistics(predictions, references) * applies[:, None]
            for name, metric in scoring.corpus_metrics().items()
            if (applies := metric.applicable_rows(references)).any()
        }
        return replace(
            self,
            row_scores={name: _scatter_rows(values, asked, math.nan) for name, values in scores.items()},
            statistics={name: _scatter_rows(values, asked, 0.0) for name, values in statistics.items()},
        )

    def has_same_tokens(self, other: ModelScores) -> bool:
        """Whether both were measured on the same supervised tokens."""
        return np.array_equal(self.tokens_id, other.tokens_id)

    def take(self, rows: np.ndarray) -> ModelScores:
        """The scores of these rows alone, given as indices or as (rows,) bool."""
        sums = self.sums
        return ModelScores(
            TokenSums(sums.nll[rows], sums.tokens[rows], sums.correct[rows]),
            self.text_bytes[rows],
            self.tokens_id[rows],
            {name: values[rows] for name, values in self.row_scores.items()},
            {name: values[rows] for name, values in self.statistics.items()},
            None if self.kl is None else self.kl[rows],
        )

    def compute_measures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure for each row of `weights` (draws, rows): {name: (draws,)}; nan where it does not apply.

        With weights w over rows i: loss = sum w nll / sum w tokens, in nats per supervised token; perplexity =
        exp(loss); bits_per_token = loss / ln 2; bits_per_byte = sum w nll / (ln 2 sum w bytes), over the UTF-8 bytes
        of the supervised text, comparable across tokenizers (end tokens cost bits and have no bytes); token_accuracy =
        the share of supervised tokens that the model ranks first; forward_kl in nats per token. The other scores are
        weighted means over the rows that they apply to; bleu and chrf are those of the weighted set.
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

    def measure_all(self) -> Measures:
        """The measures of all rows, without those that do not apply."""
        found = self.compute_measures(np.ones((1, len(self))))
        return {name: float(values[0]) for name, values in found.items() if math.isfinite(values[0])}


def _scatter_rows(values: np.ndarray, rows: np.ndarray, fill: float) -> np.ndarray:
    """The values of some rows in an array for all rows."""
    whole = np.full((len(rows), *values.shape[1:]), fill)
    whole[rows] = values
    return whole


@dataclass(frozen=True)
class Bootstrap:
    """Efron's percentile bootstrap: intervals at `confidence` from `resamples` draws of the rows with replacement.

    Both models of a comparison are measured on the same draws (paired), so the difficulty of rows cancels out.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def measure_change(self, after: ModelScores, before: ModelScores) -> tuple[Measures, dict[str, Interval]]:
        """The difference (after minus before) of each measure that both have, and its interval.

        Measures per token are left out where the tokens differ.
        """
        values, old = after.measure_all(), before.measure_all()
        shared = [n for n in values if n in old and (after.has_same_tokens(before) or n not in PER_TOKEN)]
        drawn = self.measure_intervals(after, minus=before)
        return {n: values[n] - old[n] for n in shared}, {n: drawn[n] for n in shared if n in drawn}

    def measure_intervals(self, scored: ModelScores, minus: ModelScores | None = None) -> dict[str, Interval]:
        """The interval of every measure of `scored`, or of its difference from that of `minus`, on the same rows.

        There is no interval for a single row, nor for a measure that is infinite in some resample. Resamples without a
        row that a metric applies to do not count for that metric.
        """
        if self.resamples == 0 or len(scored) < 2:
            return {}
        parts = []
        for weights in self._draw_weights(len(scored)):
            values = scored.compute_measures(weights)
            parts.append(values if minus is None else subtract_measures(values, minus.compute_measures(weights)))
        drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        known = {name: values[~np.isnan(values)] for name, values in drawn.items()}
        return {name: ends for name, values in known.items() if (ends := self.find_ends(values))}

    def draw_measure(self, models: Sequence[ModelScores], name: str) -> np.ndarray:
        """One measure of several models on the same resamples of their common rows, (draws, models)."""
        blocks = self._draw_weights(len(models[0]))
        parts = [np.stack([model.compute_measures(block)[name] for model in models], 1) for block in blocks]
        return np.concatenate(parts) if parts else np.zeros((0, len(models)))

    def draw_ratios(self, sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Sums over resampled rows per token of those rows, (draws, columns), of `sums` (rows, columns).

        `tokens` is (rows,). Empty without resamples, and for a single row, which has no interval.
        """
        blocks = self._draw_weights(len(tokens)) if len(tokens) > 1 else ()
        parts = [(block @ sums) / (block @ tokens)[:, None] for block in blocks]
        return np.concatenate(parts) if parts else np.zeros((0, sums.shape[1]))

    def find_ends(self, draws: np.ndarray) -> Interval | None:
        """The percentile interval of (draws,) values; None if there are none, or some are not finite."""
        if not len(draws) or not np.isfinite(draws).all():
            return None
        low, high = np.percentile(draws, [50 * (1 - self.confidence), 50 * (1 + self.confidence)])
        return float(low), float(high)

    def _draw_weights(self, rows: int) -> Iterator[np.ndarray]:
        """Counts of resampled rows, (draws, rows), in blocks of draws."""
        generator = np.random.default_rng(self.seed)
        left, at_once = self.resamples, max(1, DRAWN_AT_ONCE // rows)
        while left > 0:
            draws = min(left, at_once)
            yield generator.multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float64)
            left -= draws


def subtract_measures(values: Mapping[str, np.ndarray], of_base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The differences from the base, for the measures that both have; infinite where either is, as a perplexity may."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        shared = {name: (value, of_base[name]) for name, value in values.items() if name in of_base}
        return {n: np.where(np.isinf(a) | np.isinf(b), np.inf, a - b) for n, (a, b) in shared.items()}
