"""Measures are sums over tokens or rows, so those of parts add up to the whole; intervals are paired and repeatable."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu

from training_lens.evaluation.evaluator import TokenSums
from training_lens.evaluation.model_scores import Bootstrap, ModelScores

RNG = np.random.default_rng(3)
WORDS = "the cat sat on a mat while nine dogs ran home again".split()


def scored(rows: int = 40, shift: float = 0.0, seed: int = 0) -> ModelScores:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, rows)
    nll = tokens * (2.0 + rng.random(rows) + shift)
    return ModelScores(TokenSums(nll, tokens, rng.integers(0, tokens + 1)), 4 * tokens, np.arange(rows))


def sentences(rows: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(rows)]


def test_the_measures_of_two_rows_by_hand() -> None:
    two = ModelScores(
        TokenSums(np.array([2.0, 4.0]), np.array([1, 3]), np.array([1, 1])), np.array([2, 10]), np.arange(2)
    )
    found = two.measure_all()
    assert found["loss"] == pytest.approx(6 / 4)
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["bits_per_token"] == pytest.approx(1.5 / math.log(2))
    assert found["bits_per_byte"] == pytest.approx(6 / math.log(2) / 12)
    assert found["token_accuracy"] == pytest.approx(2 / 4)
    assert two.take(np.array([False, True])).measure_all()["loss"] == pytest.approx(4 / 3)


def test_scores_of_answers_count_only_the_rows_that_were_asked() -> None:
    rows = scored(3).with_answers(["yes", ""], ["yes", "no"], np.array([True, False, True]))
    assert rows.measure_all()["exact_match"] == 0.5
    assert rows.take(np.array([0, 1])).measure_all()["exact_match"] == 1.0
    assert "exact_match" not in rows.take(np.array([1])).measure_all()


def test_bleu_and_chrf_of_any_rows_are_those_of_sacrebleu() -> None:
    said, wanted = sentences(40, 1), sentences(40, 2)
    rows = scored().with_answers(said, wanted, np.ones(40, dtype=bool))
    chosen = RNG.random(40) < 0.5
    found = rows.take(chosen).measure_all()
    some = [(one, other) for one, other, yes in zip(said, wanted, chosen, strict=True) if yes]
    of_four_words = [(one, other) for one, other in some if len(other.split()) >= 4]
    assert 0 < len(of_four_words) < len(some)
    predictions, references = zip(*of_four_words, strict=True)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score)
    predictions, references = zip(*some, strict=True)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)


def test_parts_weighted_by_tokens_are_the_whole() -> None:
    rows = scored()
    part = RNG.random(40) < 0.3
    whole, one, other = (rows.take(p).measure_all()["loss"] for p in (np.ones(40, dtype=bool), part, ~part))
    share = rows.sums.tokens[part].sum() / rows.sums.tokens.sum()
    assert whole == pytest.approx(share * one + (1 - share) * other, rel=1e-12)


def test_intervals_are_repeatable_and_hold_the_value() -> None:
    low, high = Bootstrap(seed=1).measure_intervals(scored())["loss"]
    assert (low, high) == Bootstrap(seed=1).measure_intervals(scored())["loss"]
    assert low < scored().measure_all()["loss"] < high


def test_a_pair_is_drawn_with_the_same_rows() -> None:
    """A shift that is the same for every row leaves no doubt at all: unpaired intervals would be wide."""
    low, high = Bootstrap().measure_intervals(scored(shift=0.5), minus=scored())["loss"]
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """200 samples of 60 rows: the interval of 90 % holds the mean of the population in 83 % to 97 % of them."""
    truth, held = 2.5, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        tokens = np.ones(60, dtype=np.int64)
        rows = ModelScores(TokenSums(2.0 + rng.random(60), tokens, tokens), tokens, tokens)
        low, high = Bootstrap(300, 0.9, seed).measure_intervals(rows)["loss"]
        held += low <= truth <= high
    assert 0.83 <= held / 200 <= 0.97


@pytest.mark.parametrize(("resamples", "rows"), [(0, 40), (100, 1)])
def test_no_resamples_or_one_row_has_no_intervals(resamples: int, rows: int) -> None:
    assert Bootstrap(resamples).measure_intervals(scored(rows)) == {}


def test_drawing_in_blocks_draws_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_lens.evaluation.model_scores.DRAWN_AT_ONCE", 130)
    assert [len(w) for w in Bootstrap(10)._draw_weights(40)] == [3, 3, 3, 1]


def test_a_metric_of_few_rows_has_an_interval_and_one_beyond_all_numbers_has_none() -> None:
    asked = np.zeros(40, dtype=bool)
    asked[:2] = True
    few = scored().with_answers(["a", "b"], ["a", "x"], asked)
    assert Bootstrap(200).measure_intervals(few)["exact_match"] == (0.0, 1.0)
    huge = scored(shift=1000.0)
    assert "perplexity" not in huge.measure_all() and "perplexity" not in Bootstrap(20).measure_intervals(
        huge, minus=scored()
    )
