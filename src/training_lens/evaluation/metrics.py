"""Scores of generated answers against references: by row, and over a whole set.

An empty prediction is a wrong answer in every metric; no row is left out for it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache, partial
from itertools import product
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.errors import ConfigurationError
from training_lens.evaluation.answer_numbers import (
    MORE_THAN_A_NUMBER,
    DecimalMark,
    describe_convention,
    find_convention,
    has_unread_number,
    numeric_match,
)
from training_lens.evaluation.answer_words import (
    DEFAULT_TOKENIZER,
    count_unscored,
    require_word_tokenizer,
    why_unscored,
    word_splitter,
)
from training_lens.evaluation.own_metrics import AnswerMetric, ScoreFunction, find_metrics
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.limits import load_bounded_json

TOKEN_MEASURES = ("loss", "perplexity", "bits_per_token", "bits_per_byte", "token_accuracy")


def exact_match(prediction: str, reference: str) -> bool:
    """Equal after stripping white space at both ends; nothing else is normalised, and an empty answer is wrong.

    Example:
        >>> exact_match("Tom \\n", "Tom"), exact_match("tom", "Tom"), exact_match("", "")
        (True, False, False)
    """
    return bool(prediction.strip()) and prediction.strip() == reference.strip()


def token_f1(prediction: str, reference: str, tokenizer: str = DEFAULT_TOKENIZER) -> float | None:
    """SQuAD's F1 over the words that prediction and reference share.

    F1 = 2 shared / (words of the prediction + words of the reference), after SQuAD's normalisation: lower case, no
    ASCII punctuation, no articles (a, an, the), split at white space. Other punctuation stays part of its word, as in
    the official script. From Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of
    Text", evaluate-v1.1.py. Another tokenizer than the default splits its own words. None where the reference has no
    words left (it is "A", or punctuation alone), and where its script has no spaces between words.

    Example:
        >>> token_f1("The cat sat.", "a cat"), token_f1("", "a cat")
        (0.6666666666666666, 0.0)
    """
    split = _split_squad_words if tokenizer == DEFAULT_TOKENIZER else word_splitter(tokenizer)
    predicted, expected = split(prediction), split(reference)
    if not expected or why_unscored("token_f1", reference, tokenizer):
        return None
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def _split_squad_words(text: str) -> list[str]:
    bare = text.lower().translate(_NO_PUNCTUATION)  # first, so that "a." is an article and "a-b" is none
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_f1(kind: str, prediction: str, reference: str, tokenizer: str = DEFAULT_TOKENIZER) -> float | None:
    """ROUGE's F1, without stemming, as rouge-score computes it; None where it could only be 0 (see `why_unscored`).

    F1 = 2PR / (P + R), where P and R are the shared units over those of the prediction and of the reference: words
    (rouge1), bigrams (rouge2), or words of the longest common subsequence (rougeL). Words are runs of letters and
    digits of any script in lower case; rouge-score's own tokenizer is ASCII only and splits "Zürich" into "z" and
    "rich". From Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".

    Cost: rougeL takes time and memory in the product of both lengths, about 0.5 ms for 60 words against 60.

    Example:
        >>> rouge_f1("rougeL", "the cat sat", "the dog sat"), rouge_f1("rouge1", "北京", "北京")
        (0.6666666666666666, None)
    """
    if why_unscored(kind, reference, tokenizer):
        return None
    return float(_rouge_scorer(kind, tokenizer).score(reference, prediction)[kind].fmeasure)


@cache
def _rouge_scorer(kind: str, tokenizer: str) -> Any:
    # Imported late: rouge-score takes all of nltk with it, a second.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=SimpleNamespace(tokenize=word_splitter(tokenizer)))


def json_valid(prediction: str, reference: str) -> float | None:
    """1 where the whole prediction is valid JSON (RFC 8259), else 0; None where the reference is no object or array.

    White space at both ends is allowed. JSON between words or in a Markdown fence is invalid, and so are NaN and
    Infinity.

    Example:
        >>> json_valid('{"a": 2}', '{"a": 1}'), json_valid('{"a": 1', '{"a": 1}'), json_valid("{}", "Tom")
        (1.0, 0.0, None)
    """
    if not isinstance(_parse_json(reference), dict | list):
        return None
    return float(_parse_json(prediction) is not _NO_JSON)


def json_fields(prediction: str, reference: str) -> float | None:
    """The share of the reference's values that the prediction has at the same path; 0 where it is no JSON.

    A path is keys and indices; an empty object or array is a value, too. Values must be equal in type and content;
    the number 1 equals 1.0, but not "1" or true. Further values of the prediction are ignored. None where the reference
    is no JSON object or array.

    Example:
        >>> json_fields('{"name": "Tom", "tags": ["x"]}', '{"name": "Tom", "tags": ["x", "y"]}')
        0.6666666666666666
    """
    expected = _parse_json(reference)
    if not isinstance(expected, dict | list):
        return None
    wanted, found = _list_leaves(expected), _list_leaves(_parse_json(prediction))
    pairs = [(found.get(place, _NO_JSON), value) for place, value in wanted.items()]
    return sum(type(there) is type(value) and bool(there == value) for there, value in pairs) / len(wanted)


_NO_JSON = object()


def _parse_json(text: str) -> Any:
    """The value, with numbers as Decimal; _NO_JSON where the text is invalid or nested too deep."""

    def refuse_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return load_bounded_json(text.strip(), parse_int=Decimal, parse_float=Decimal, parse_constant=refuse_constant)
    except (ValueError, ArithmeticError):  # ArithmeticError: an exponent beyond Decimal's
        return _NO_JSON


def _list_leaves(value: Any) -> dict[tuple[str | int, ...], Any]:
    """The leaf values by path; without recursion, so that any depth works."""
    leaves: dict[tuple[str | int, ...], Any] = {}
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, here = waiting.pop()
        if here and isinstance(here, dict | list):
            inside = here.items() if isinstance(here, dict) else enumerate(here)
            waiting += [((*path, step), below) for step, below in inside]
        else:
            leaves[path] = here
    return leaves


@dataclass(frozen=True)
class AnswerScoring:
    """How the answers to one set of rows are scored.

    `word_tokenizer` (as evaluation.word_tokenizer) splits the words of BLEU, ROUGE and F1. `decimal` is the
    mark of ambiguous numbers. `own` are the user's metrics. `reading` says how numbers are read, if there are any.
    """

    word_tokenizer: str = DEFAULT_TOKENIZER
    decimal: DecimalMark = "point"
    own: Mapping[str, AnswerMetric] = field(default_factory=dict)
    reading: str = ""

    @classmethod
    def from_settings(cls, settings: EvaluationSection) -> AnswerScoring:
        """The scoring of the settings, before any row is known.

        Raises:
            ConfigurationError: a tokenizer's package is missing, a metric cannot be found, or `decide_by` is no
                measure, or one that needs answers where none are generated.
        """
        require_word_tokenizer(settings.word_tokenizer)
        own = find_metrics(settings.metrics, (*TOKEN_MEASURES, *ROW_METRICS, *CORPUS_METRICS))
        answers = (*ROW_METRICS, *CORPUS_METRICS, *own) if settings.generate else ()
        known, chosen = (*TOKEN_MEASURES, *answers), settings.decide_by
        if chosen is not None and chosen not in known:
            without = "" if settings.generate else " without answers (evaluation.generate=false)"
            raise ConfigurationError(
                f"evaluation.decide_by: '{chosen}' is no measure{without}; there are: {', '.join(known)}."
                f"{did_you_mean(chosen, known)}"
            )
        return cls(settings.word_tokenizer, "comma" if settings.decimal == "comma" else "point", own)

    def adapt_to_references(self, references: Sequence[str], decimal: str) -> AnswerScoring:
        """The scoring of a set of rows: with `decimal` auto, numbers are read as its right answers write them."""
        found = find_convention(references)
        mark = found.decimal if decimal == "auto" else self.decimal
        reading = describe_convention(references, replace(found, decimal=mark), decimal)
        return replace(self, decimal=mark, reading=reading)

    def row_metrics(self) -> dict[str, ScoreFunction]:
        """The metrics of single rows, from 0 to 1 (but for the user's own), in the order of tables."""
        words = self.word_tokenizer
        return {
            "exact_match": exact_match,
            "token_f1": partial(token_f1, tokenizer=words),
            **{kind: partial(rouge_f1, kind, tokenizer=words) for kind in ("rouge1", "rouge2", "rougeL")},
            "json_valid": json_valid,
            "json_fields": json_fields,
            "numeric": partial(numeric_match, decimal=self.decimal),
            **self.own,
        }

    def corpus_metrics(self) -> dict[str, CorpusMetric]:
        """The metrics of a whole set."""
        return {
            # lengths; n-grams shared and predicted, by order
            "bleu": CorpusMetric("bleu", 2 + 2 * 4, self.word_tokenizer),
            "chrf": CorpusMetric("chrf", 3 * 6),  # for each order n-grams predicted, expected and shared
        }

    def count_unscored(
        self, references: Sequence[str], scores: Iterable[Mapping[str, np.ndarray]] = ()
    ) -> dict[str, dict[str, int]]:
        """The rows that word measures, `numeric` and the user's metrics leave out, by measure and reason.

        `scores` are each model's row scores, of the rows with these references and of others, which are nan.
        """
        found = count_unscored(references, self.word_tokenizer)
        if unread := sum(has_unread_number(reference, self.decimal) for reference in references):
            found["numeric"] = {MORE_THAN_A_NUMBER: unread}
        for model, name in product(scores, self.own):
            scored = int((~np.isnan(model[name])).sum()) if name in model else 0
            if scored < len(references):
                found[name] = {"the metric gives None": len(references) - scored}
        return found


def row_scores(
    predictions: Sequence[str], references: Sequence[str], scoring: AnswerScoring | None = None
) -> dict[str, np.ndarray]:
    """Every row metric on every row.

    Returns:
        For each metric (rows,) float64, nan where it does not apply; metrics that apply to no row are left out.

    Raises:
        ValueError: predictions and references differ in number.
        EvaluationError: a metric of the user's fails.

    Example:
        >>> row_scores(["Tom"], ["Tom"])["exact_match"]
        array([1.])
    """
    columns = {
        name: np.array([metric(p, r) for p, r in zip(predictions, references, strict=True)], dtype=np.float64)
        for name, metric in (scoring or AnswerScoring()).row_metrics().items()  # numpy makes nan of None
    }
    return {name: column for name, column in columns.items() if not np.isnan(column).all()}


@dataclass(frozen=True)
class CorpusMetric:
    """A score of a whole set that is not a mean over rows: it is computed from the summed counts of its rows.

    So the score of any subset or bootstrap resample costs a sum, not another pass over the texts.

    bleu: n-grams of one to four words, mteval-v13a's words (or those of `tokenizer`), exponential smoothing (Papineni
    et al. 2002; Post 2018, "A Call for Clarity in Reporting BLEU Scores"). chrf: n-grams of one to six characters,
    white space left out, recall weighed double (Popović 2015, "chrF: character n-gram F-score"). Both with sacrebleu's
    defaults, and equal to its `corpus_bleu` and `corpus_chrf` over the `applicable_rows`.

    Example:
        >>> metric = CORPUS_METRICS["chrf"]
        >>> rows = metric.row_statistics(["the cat", ""], ["the cat", "a dog"])
        >>> rows.shape, round(metric.score(rows[:1].sum(axis=0)), 6), round(metric.score(rows.sum(axis=0)), 2)
        ((2, 18), 100.0, 81.03)
    """

    name: str
    width: int
    tokenizer: str = DEFAULT_TOKENIZER

    def applicable_rows(self, references: Sequence[str]) -> np.ndarray:
        """The rows that the metric applies to, (rows,) bool; see `answer_words.why_unscored`."""
        return np.array([why_unscored(self.name, r, self.tokenizer) is None for r in references], dtype=bool)

    def row_statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """The counts of each row: (rows, width) float64; an empty prediction still counts its reference.

        Raises:
            ValueError: predictions and references differ in number.
        """
        # sacrebleu has no public access to the counts of a row; its own significance tests use these two methods.
        # One row at a time, it also does not warn of spaces before periods, as it does for a hundred rows.
        extract = _sacrebleu_metric(self.name, self.tokenizer)._extract_corpus_statistics
        rows = [extract([p], [[r]])[0] for p, r in zip(predictions, references, strict=True)]
        return np.array(rows, dtype=np.float64).reshape(-1, self.width)  # no rows: (0, width)

    def score(self, sums: np.ndarray) -> float:
        """The score, 0 to 100, of the rows whose counts sum to `sums`, (width,)."""
        return float(_sacrebleu_metric(self.name, self.tokenizer)._compute_score_from_stats(sums.tolist()).score)


@cache
def _sacrebleu_metric(name: str, tokenizer: str) -> BLEU | CHRF:
    return BLEU(tokenize=tokenizer) if name == "bleu" else CHRF()


ROW_METRICS = AnswerScoring().row_metrics()
CORPUS_METRICS = AnswerScoring().corpus_metrics()
