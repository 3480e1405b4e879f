"""Scores of generated answers against references: row by row, and over a whole set.

An empty prediction is a wrong answer in every metric, never a row left out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from training_lens.evaluation.structured import json_fields, json_valid, numeric

# (prediction, reference) -> score from 0 to 1, or None: the metric does not apply to this row.
RowMetric = Callable[[str, str], float | None]


def exact_match(prediction: str, reference: str) -> bool:
    """Equal once white space at both ends is taken off; nothing else is normalised, an empty answer is wrong.

    Example:
        >>> exact_match("Tom \\n", "Tom"), exact_match("tom", "Tom"), exact_match("", "")
        (True, False, False)
    """
    return bool(prediction.strip()) and prediction.strip() == reference.strip()


def token_f1(prediction: str, reference: str) -> float | None:
    """The words that prediction and reference share, each as often as both have it: SQuAD's F1.

    F1 = 2 shared / (words of the prediction + words of the reference), after SQuAD's normalisation: lower case, ASCII
    punctuation and the articles a, an, the taken out, split at white space. Other punctuation stays part of its word,
    as in the official script, and a language without spaces is one long word. From Rajpurkar et al. 2016, "SQuAD:
    100,000+ Questions for Machine Comprehension of Text", evaluate-v1.1.py.

    Returns:
        None where nothing of the reference is left to find: one that is "A", or punctuation alone.

    Example:
        >>> token_f1("The cat sat.", "a cat"), token_f1("", "a cat")
        (0.6666666666666666, 0.0)
    """
    said, expected = _squad_words(prediction), _squad_words(reference)
    if not expected:
        return None
    shared = (Counter(said) & Counter(expected)).total()
    return 2 * shared / (len(said) + len(expected))


def _squad_words(text: str) -> list[str]:
    bare = text.lower().translate(_NO_PUNCTUATION)  # first, so that "a." is an article and "a-b" is none
    return _ARTICLES.sub(" ", bare).split()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def rouge(kind: str, prediction: str, reference: str) -> float | None:
    """ROUGE's F1, without stemming, as rouge-score computes it.

    F1 = 2PR / (P + R), where P and R are what both have over what the prediction and what the reference has: single
    words (rouge1), pairs of neighbours (rouge2), or words of the longest common subsequence (rougeL). Words are runs
    of ASCII letters and digits in lower case: "Zürich" is "z" and "rich". A reference of one word has no pairs; its
    rouge2 is 0, whatever is said. From Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".

    Cost: rougeL takes time and memory in the product of both lengths, about 0.5 ms for 60 words against 60.

    Args:
        kind: rouge1, rouge2 or rougeL.

    Returns:
        None where the reference has no such word (Chinese, Russian): 0 would say that the answer is wrong.

    Example:
        >>> rouge("rougeL", "the cat sat", "the dog sat"), rouge("rouge1", "北京", "北京")
        (0.6666666666666666, None)
    """
    tokenizer, scorer = _rouge_scorer(kind)
    if not tokenizer.tokenize(reference):
        return None
    return float(scorer.score(reference, prediction)[kind].fmeasure)


@cache
def _rouge_scorer(kind: str) -> tuple[Any, Any]:
    # Imported late: rouge-score takes all of nltk with it, a second.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=False)
    return tokenizer, RougeScorer([kind], tokenizer=tokenizer)


# In the order of tables; the score of a set is the mean of its rows'.
ROW_METRICS: dict[str, RowMetric] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "json_valid": json_valid,
    "json_fields": json_fields,
    "numeric": numeric,
}


def row_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Every row metric on every row.

    Returns:
        For each metric (rows,) float64, nan where it does not apply; metrics that apply to no row are left out.

    Raises:
        ValueError: there are more of one than of the other.

    Example:
        >>> row_scores(["Tom"], ["Tom"])["exact_match"]
        array([1.])
    """
    columns = {
        name: np.array([metric(p, r) for p, r in zip(predictions, references, strict=True)], dtype=np.float64)
        for name, metric in ROW_METRICS.items()  # numpy makes nan of None
    }
    return {name: column for name, column in columns.items() if not np.isnan(column).all()}


@dataclass(frozen=True)
class CorpusMetric:
    """A score of a whole set that is no mean of its rows': each row gives counts, the score is that of their sums.

    So the score of any choice of rows, as in a bootstrap, costs a sum and not another pass over the texts.

    bleu: n-grams of one to four words, mteval-v13a's words, exponential smoothing (Papineni et al. 2002; Post 2018, "A
    Call for Clarity in Reporting BLEU Scores"). chrf: n-grams of one to six characters, white space left out, recall
    weighed double (Popović 2015, "chrF: character n-gram F-score"). Both with sacrebleu's defaults, and equal to what
    its `corpus_bleu` and `corpus_chrf` give. In a language without spaces only chrf tells much, and where no prediction
    has four words bleu is 0.

    Example:
        >>> metric = CORPUS_METRICS["chrf"]
        >>> rows = metric.statistics(["the cat", ""], ["the cat", "a dog"])
        >>> rows.shape, round(metric.score(rows[:1].sum(axis=0)), 6), round(metric.score(rows.sum(axis=0)), 2)
        ((2, 18), 100.0, 81.03)
    """

    name: str
    width: int

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """What each row adds to the sums: (rows, width) float64 of counts; an empty prediction adds its reference.

        Raises:
            ValueError: there are more of one than of the other.
        """
        # sacrebleu's significance tests resample by these two methods; it has no public way to the counts of a row.
        # Row by row it also keeps its advice on spaces before periods to itself, which a hundred of them call forth.
        extract = _sacrebleu(self.name)._extract_corpus_statistics
        rows = [extract([p], [[r]])[0] for p, r in zip(predictions, references, strict=True)]
        return np.array(rows, dtype=np.float64).reshape(-1, self.width)  # no rows: (0, width)

    def score(self, sums: np.ndarray) -> float:
        """The score from 0 to 100 of the rows whose statistics add up to `sums`, (width,)."""
        return float(_sacrebleu(self.name)._compute_score_from_stats(sums.tolist()).score)


@cache
def _sacrebleu(name: str) -> BLEU | CHRF:
    return BLEU() if name == "bleu" else CHRF()


# In the order of tables.
CORPUS_METRICS = {
    "bleu": CorpusMetric("bleu", 2 + 2 * 4),  # both lengths in words; for each order n-grams shared, and said
    "chrf": CorpusMetric("chrf", 3 * 6),  # for each order n-grams said, expected, and shared
}
