"""Advice in the words of the loop that trained: no key of our config for another trainer."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import training_lens
from training_lens.analysis.advice import translate_advice
from training_lens.analysis.findings.interventions import QUESTIONS, Question, name_test
from training_lens.analysis.findings.rate_low import RULE as RATE_LOW
from training_lens.config.keys import known_keys
from training_lens.config.schema import TrainingConfig

SOURCE = Path(training_lens.__file__).parent
FILES = [*(SOURCE / "analysis" / "findings").glob("*.py"), SOURCE / "evaluation" / "training_verdict.py"]
OURS = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, known_keys(TrainingConfig))) + r")(?![\w.])")


def texts() -> list[str]:
    """Every text in the source of the findings that names a key of our config."""
    trees = [ast.parse(file.read_text()) for file in FILES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = (node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings)
    found = {node.value for node in constants if isinstance(node.value, str)}
    return sorted(text for text in found if OURS.search(text))


@pytest.mark.parametrize("origin", ["transformers", "hand"])
def test_no_key_of_ours_is_left_for_another_trainer(origin: str) -> None:
    assert len(texts()) > 10
    for text in texts():
        translated = translate_advice(text, origin)
        assert not OURS.search(translated) and "training-lens " not in translated, text


@pytest.mark.parametrize("question", QUESTIONS)
def test_no_test_run_is_offered_for_another_trainer(question: Question) -> None:
    decide = name_test(RATE_LOW.report_inconclusive("Not known", "2 steps", "at least 50 steps"), question).decide
    assert "--test" in translate_advice(decide, "training-lens")
    assert translate_advice(decide, "transformers") == "at least 50 steps"


def test_ours_stays_as_it_is_and_others_have_their_own_words() -> None:
    advice = "halve training.lr, or set data.validation or data.val_ratio"
    assert translate_advice(advice, "training-lens") == advice
    assert translate_advice(advice, "transformers") == "halve learning_rate, or set eval_dataset"
    assert translate_advice(advice, "hand") == "halve the learning rate, or set held-out rows"
