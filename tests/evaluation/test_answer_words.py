"""Measures of words are left out of rows in which they can only be 0, and it is said of how many, and why."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest

from training_lens.errors import ConfigurationError
from training_lens.evaluation import answer_words
from training_lens.evaluation.answer_words import (
    NO_SPACES,
    count_unscored,
    require_word_tokenizer,
    split_words,
    why_unscored,
)
from training_lens.evaluation.metrics import AnswerScoring, row_scores

WORD_MEASURES = ("bleu", "rouge1", "rouge2", "rougeL", "token_f1")
UNSPACED = {
    "Thai": "นกฮูกอาศัยอยู่ในป่า",
    "Chinese": "猫头鹰住在树林里。",
    "Japanese": "フクロウは森に住んでいます。",
    "Khmer": "ទីទុយរស់នៅក្នុងព្រៃ",
    "Lao": "ນົກເຄົ້າອາໄສຢູ່ໃນປ່າ",
    "Burmese": "ဇီးကွက်သည်တောတွင်နေသည်",
    "Tibetan": "འུག་པ་ནགས་ཚལ་ནང་དུ་སྡོད།",
}
SPACED = {
    "Hindi": "उल्लू जंगल में रहता है।",
    "Arabic": "البومة تعيش في الغابة.",
    "Russian": "Сова живёт в лесу.",
    "Korean": "올빼미는 숲 속에 산다.",
    "Amharic": "ጉጉት በጫካ ውስጥ ይኖራል።",
    "German": "Die Eule wohnt im Wald.",
    "Greek": "κουκουβάγια ζει στο δάσος.",
}


@pytest.mark.parametrize("text", UNSPACED.values(), ids=UNSPACED)
def test_scripts_without_spaces_have_no_words_but_for_a_tokenizer_that_divides_them(text: str) -> None:
    assert {why_unscored(name, text) for name in WORD_MEASURES} == {NO_SPACES}
    assert {why_unscored(name, text, "char") for name in WORD_MEASURES} == {None}
    assert why_unscored("chrf", text) is None and why_unscored("exact_match", text) is None


@pytest.mark.parametrize("text", SPACED.values(), ids=SPACED)
def test_scripts_with_spaces_are_scored_by_their_words(text: str) -> None:
    assert {why_unscored(name, text) for name in WORD_MEASURES} == {None}
    scores = row_scores([text], [text])
    assert [scores[name][0] for name in ("rouge1", "rouge2", "rougeL", "token_f1")] == [1.0] * 4


def test_a_foreign_name_in_a_text_of_words_changes_nothing() -> None:
    assert why_unscored("bleu", "The owl lives in the forest of 北京, they say.") is None
    assert why_unscored("bleu", "猫头鹰住在树林里 (owl)") == NO_SPACES


def test_zh_divides_chinese_alone() -> None:
    assert why_unscored("bleu", UNSPACED["Chinese"], "zh") is None
    assert why_unscored("bleu", UNSPACED["Thai"], "zh") == NO_SPACES
    scored = AnswerScoring("zh")
    assert scored.row_metrics()["rougeL"]("猫头鹰住树林", "猫头鹰住在树林里") == pytest.approx(12 / 14)


def test_short_answers_are_left_out_of_measures_of_runs_and_counted() -> None:
    found = count_unscored(["yes", "no", "It is so.", "It is not so.", UNSPACED["Thai"]])
    assert found["bleu"] == {"fewer than four words": 3, NO_SPACES: 1}
    assert found["rouge2"] == {"a single word": 2, NO_SPACES: 1}
    assert found["rouge1"] == {NO_SPACES: 1}
    assert count_unscored(["It is not so."]) == {}


def test_combining_marks_stay_in_their_words_and_one_letter_has_one_form() -> None:
    assert split_words("Cafe\u0301 l\u2019eau_2") == ["caf\u00e9", "l", "eau", "2"]


def test_a_tokenizer_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_words, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'sacrebleu\[ja\]'"):
        require_word_tokenizer("ja-mecab")
    require_word_tokenizer("13a")


@pytest.mark.parametrize(
    ("texts", "share"),
    [([*list(UNSPACED.values())[:2], *list(SPACED.values())[-3:]], 3 / 5), (["yes", "no", "yes", "42", "owl"], 0)],
    ids=["scripts", "short"],
)
def test_right_answers_score_full_marks_or_none(texts: list[str], share: float) -> None:
    check_right_answers(texts, share, share)


@pytest.mark.parametrize(
    ("file", "bleu", "rouge2"),
    [("14-non-latin-metrics/rows.jsonl", 3 / 5, 3 / 5), ("28-short-answers-bleu/validation.jsonl", 0, 0)],
)
def test_right_answers_of_the_shared_rows_score_full_marks_or_none(
    shared: Path, file: str, bleu: float, rouge2: float
) -> None:
    lines = (shared / "cases" / file).read_text(encoding="utf-8").splitlines()
    check_right_answers([json.loads(line)["answer"] for line in lines][:5], bleu, rouge2)


def check_right_answers(texts: list[str], bleu: float, rouge2: float) -> None:
    """So many of the texts are scored, and all of these in full."""
    scoring = AnswerScoring()
    scores = row_scores(texts, texts, scoring)
    assert np.mean(scoring.corpus_metrics()["bleu"].applicable_rows(texts)) == bleu
    assert np.mean(~np.isnan(scores["rouge2"])) == rouge2 if rouge2 else "rouge2" not in scores
    assert all(np.nanmin(column) == 1 for column in scores.values())


def test_the_examples_of_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(answer_words)
    assert tried == 2 and not failed
