"""Scores are those worked out by hand, and those of sacrebleu and rouge-score called directly."""

from __future__ import annotations

import doctest
import logging
import math
import random

import numpy as np
import pytest
import sacrebleu

from training_lens.evaluation import metrics
from training_lens.evaluation.metrics import (
    CORPUS_METRICS,
    ROW_METRICS,
    exact_match,
    rouge_f1,
    row_scores,
    token_f1,
)

WORDS = "the cat sat on a mat . Tom's dog, 3,000 rows; naïve café 北京 — “so” it is!\nNo &amp; yes".split(" ")


def random_texts(seed: int, count: int = 50) -> list[str]:
    """Word strings of nought to twelve words; about one in six is empty."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.choice([0, 0, *range(1, 11)]))) for _ in range(count)]


PREDICTIONS, REFERENCES = random_texts(0), [text or "Tom" for text in random_texts(1)]


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("Tom", "Tom", True),
        (" Tom\n", "Tom", True),
        ("Tom", "\tTom ", True),
        ("tom", "Tom", False),
        ("", "", False),
        ("", "Tom", False),
        (" \n", " \n", False),
        ("a\nb", "a\nb", True),
        ("a\nb", "a b", False),
        ("Tom Tom", "Tom", False),
        ("Tom.", "Tom", False),
        ("北京", "北京", True),
        ("caf\u00e9", "cafe\u0301", False),  # the same letter written in two ways: nothing is normalised
    ],
)
def test_exact_match(prediction: str, reference: str, same: bool) -> None:
    assert exact_match(prediction, reference) is same


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Tom", "Tom", 1),
        ("", "Tom", 0),
        ("the", "Tom", 0),  # an article alone says nothing
        ("A cat.", "cat!", 1),
        ("the cat sat on the mat", "cat on mat", 6 / 7),  # shared 3, of 4 and 3
        ("no no no", "no no yes", 4 / 6),  # "no" is shared twice
        ("red\nblue", "blue\n\ngreen", 2 / 4),
        ("ZÜRICH", "zürich", 1),
        ("“Tom”", "Tom", 0),  # these quotation marks are not ASCII: they stay
        ("state-of-the-art", "stateoftheart", 1),  # the hyphens go before the article could
        ("cat—the—dog", "cat— —dog", 1),  # an article leaves a space
        ("北京市", "北京", None),  # one long word: see words.why_unscored
        ("a theatre", "theatre", 1),
        ("A", "A", None),
        ("Tom", "...", None),
        ("", "", None),
    ],
)
def test_token_f1(prediction: str, reference: str, score: float | None) -> None:
    assert token_f1(prediction, reference) == (None if score is None else pytest.approx(score, abs=1e-12))


@pytest.mark.parametrize(
    ("prediction", "reference", "unigrams", "bigrams", "subsequence"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 5 / 6, 3 / 5, 5 / 6),
        ("", "Tom ran", 0, 0, 0),
        ("!?", "Tom ran", 0, 0, 0),
        ("Tom", "Tom", 1, None, 1),  # one word has no pairs
        ("TOM, ran!", "tom ran", 1, 1, 1),
        ("“Tom” — ran", "Tom ran", 1, 1, 1),
        ("Zurich", "Zürich", 0, None, 0),
        ("In ZÜRICH", "in Zürich", 1, 1, 1),  # not z and rich, which rouge-score's own tokenizer finds
        ("उल्लू जंगल में", "उल्लू जंगल में रहता है।", 6 / 8, 4 / 6, 6 / 8),
        ("البومة في الغابة", "البومة تعيش في الغابة", 6 / 7, 2 / 5, 6 / 7),
        ("Сова живёт", "Сова живёт в лесу", 4 / 6, 2 / 4, 4 / 6),
        ("no no no", "no no yes", 2 / 3, 1 / 2, 2 / 3),  # (no no) is in the reference once
        ("sat cat the", "the cat sat", 1, 0, 1 / 3),
        ("red\nblue", "red blue green", 4 / 5, 2 / 3, 4 / 5),  # P 1, R 2/3; pairs: P 1, R 1/2
        ("a b c d", "b d", 2 / 3, 0, 2 / 3),  # P 2/4, R 1
        ("running", "runs", 0, None, 0),  # no stemming
    ],
)
def test_rouge(prediction: str, reference: str, unigrams: float, bigrams: float | None, subsequence: float) -> None:
    for kind, wanted in {"rouge1": unigrams, "rouge2": bigrams, "rougeL": subsequence}.items():
        score = rouge_f1(kind, prediction, reference)
        assert score == (None if wanted is None else pytest.approx(wanted, abs=1e-12)), kind


@pytest.mark.parametrize("reference", ["北京", "นกฮูกอาศัยอยู่ในป่า", "...", ""])
def test_rouge_does_not_apply_without_words(reference: str) -> None:
    assert [rouge_f1(kind, "北京", reference) for kind in ("rouge1", "rouge2", "rougeL")] == [None] * 3


def corpus(name: str, predictions: list[str], references: list[str]) -> float:
    metric = CORPUS_METRICS[name]
    return metric.score(metric.row_statistics(predictions, references).sum(axis=0))


@pytest.mark.parametrize(
    ("predictions", "references", "score"),
    [
        (["the cat sat down"], ["the cat sat down"], 1),
        ([""], ["the cat"], 0),
        (["a b c d"], ["a b c d e f g h"], math.exp(-1)),  # all right, half as long: exp(1 - 8/4)
        (["a b c d"], ["a b c e"], (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25),  # the last: 0 of 1, smoothed to 1/2
        (["a b c d e"], ["a b c d"], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        (["the the the the"], ["the cat is here"], (1 / 4 * 1 / 6 * 1 / 8 * 1 / 8) ** 0.25),  # 1/(2*3) 1/(4*2) 1/(8*1)
        (["a b c d", ""], ["a b c d", "e f g h"], math.exp(-1)),  # the empty one counts: 4 words against 8
        (["", "a b c d"], ["e f g h", "a b c d"], math.exp(-1)),
        (["Äpfel und Öl da"], ["Äpfel und Öl hier"], (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25),
        (["a b\nc d"], ["a b c d"], 1),
        (["a b c."], ["a b c ."], 1),
        (["Tom"], ["Tom"], 0),  # a set without any four words in a row has no BLEU
        (["Tom", "a b c d"], ["Tom", "a b c d"], 1),
        (["abcdefgh"], ["abcdefgx"], 0),  # words, not characters
    ],
)
def test_bleu(predictions: list[str], references: list[str], score: float) -> None:
    assert corpus("bleu", predictions, references) == pytest.approx(100 * score, abs=1e-9)


@pytest.mark.parametrize(
    ("predictions", "references", "score"),  # 5PR / (4P + R), P and R means over the orders that both texts have
    [
        (["cat"], ["cat"], 1),
        ([""], ["cat"], 0),
        (["x"], ["y"], 0),
        (["CAT"], ["cat"], 0),
        (["a b"], ["ab"], 1),
        (["a\nb"], ["a b"], 1),
        (["abd"], ["abc"], 7 / 18),  # P = R = (2/3 + 1/2 + 0) / 3
        (["北京"], ["北海"], 1 / 4),  # (1/2 + 0) / 2
        (["aaa"], ["a"], 5 / 7),  # P 1/3, R 1
        (["a"], ["aaa"], 5 / 13),  # P 1, R 1/3
        (["abc"], ["abcdef"], 5 * (23 / 60) / (4 + 23 / 60)),  # P 1, R (3/6 + 2/5 + 1/4) / 3
        (["cat", ""], ["cat", "dog"], 5 / 9),  # the empty one counts: P 1, R 1/2 in each order
        (["", "cat"], ["dog", "cat"], 5 / 9),
    ],
)
def test_chrf(predictions: list[str], references: list[str], score: float) -> None:
    assert corpus("chrf", predictions, references) == pytest.approx(100 * score, abs=1e-9)


def test_corpus_scores_are_those_of_sacrebleu() -> None:
    assert "" in PREDICTIONS
    each = [([p], [r]) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    for predictions, references in [(PREDICTIONS, REFERENCES), *each]:
        assert corpus("bleu", predictions, references) == sacrebleu.corpus_bleu(predictions, [references]).score
        assert corpus("chrf", predictions, references) == sacrebleu.corpus_chrf(predictions, [references]).score


@pytest.mark.parametrize("name", CORPUS_METRICS)
def test_the_sums_of_any_rows_give_the_score_of_these_rows(name: str) -> None:
    metric, direct = CORPUS_METRICS[name], getattr(sacrebleu, f"corpus_{name}")
    rows = metric.row_statistics(PREDICTIONS, REFERENCES)
    assert rows.shape == (50, metric.width) and rows.dtype == np.float64
    for chosen in np.random.default_rng(0).integers(0, 50, (10, 50)):
        again = [PREDICTIONS[i] for i in chosen], [[REFERENCES[i] for i in chosen]]
        assert metric.score(rows[chosen].sum(axis=0)) == direct(*again).score > 0


def test_no_rows_have_no_statistics_and_no_score() -> None:
    for metric in CORPUS_METRICS.values():
        rows = metric.row_statistics([], [])
        assert rows.shape == (0, metric.width) and metric.score(rows.sum(axis=0)) == 0


def test_periods_that_stand_apart_call_for_no_advice(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["It is so ."] * 120
    with caplog.at_level(logging.DEBUG):
        assert corpus("bleu", texts, texts) == pytest.approx(100)
    assert not caplog.records


def test_rouge_of_ascii_texts_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer  # with nltk, which takes long to import

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds)
    applies = 0
    ascii_alone = [[text.encode("ascii", "ignore").decode() for text in texts] for texts in (PREDICTIONS, REFERENCES)]
    for prediction, reference in zip(*ascii_alone, strict=True):
        direct = scorer.score(reference, prediction)
        for kind in kinds:
            score = rouge_f1(kind, prediction, reference)
            assert score is None or score == direct[kind].fmeasure
            applies += score is not None
    assert applies > 100


def test_row_scores_have_a_value_for_each_row_and_nan_where_a_metric_does_not_apply() -> None:
    scores = row_scores(["Tom", '{"a": 1}', ""], ["Tom", '{"a": 1}', "北京"])
    assert list(scores) == ["exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "json_valid", "json_fields"]
    assert all(column.shape == (3,) and column.dtype == np.float64 for column in scores.values())
    np.testing.assert_array_equal(scores["exact_match"], [1, 1, 0])
    np.testing.assert_array_equal(scores["rouge1"], [1, 1, np.nan])
    np.testing.assert_array_equal(scores["json_fields"], [np.nan, 1, np.nan])


def test_no_row_metric_rewards_an_empty_prediction() -> None:
    references = ["Tom ran", "{}", '{"a": null}', "#### 0", "The", "北京", "..."]
    scores = row_scores([""] * len(references), references)
    assert list(scores) == list(ROW_METRICS)
    assert all(np.nanmax(column) == 0 for column in scores.values())


def test_no_rows_have_no_row_scores() -> None:
    assert row_scores([], []) == {}


def test_predictions_without_their_references_are_refused() -> None:
    for predictions, references in ((["a", "b"], ["a"]), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="zip"):
            row_scores(predictions, references)
        with pytest.raises(ValueError, match="zip"):
            CORPUS_METRICS["bleu"].row_statistics(predictions, references)


def test_the_examples_of_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(metrics)
    assert tried > 4 and not failed
