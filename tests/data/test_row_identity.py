"""Rows are the same by what they say: case, white space, punctuation and a few leading words do not matter."""

from __future__ import annotations

import numpy as np
import pytest

from training_lens.data.examples import Example, Message
from training_lens.data.row_identity import find_same_questions, identify_example


def example(question: str, answer: str = "Yes.", *earlier: Message, domain: str | None = None) -> Example:
    return Example((*earlier, Message("user", question), Message("assistant", answer)), domain, "f", 1)


def is_same(a: Example, b: Example) -> bool:
    hashes = (np.array([identify_example(each).columns], dtype=np.uint64) for each in (a, b))
    return bool(find_same_questions(*hashes)[0] == 0)


@pytest.mark.parametrize(
    "other",
    [
        "How many apples has Tom ? ",
        "how many APPLES\n has tom",
        "So, how many apples has Tom?",
        "Please tell me: How many apples has Tom?",
        "How many apples has Tom",
    ],
)
def test_the_same_question(other: str) -> None:
    question = "How many apples has Tom?"
    assert is_same(example(question), example(other, "No.")) and is_same(example(other), example(question))


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("How many are 3 + 4?", "How many are 3 - 4?"),
        ("How many are 3.5 + 4?", "How many are 35 + 4?"),
        ("How many are .5 + 4?", "How many are 5 + 4?"),
        ("Is it red?", "Now is it red?"),  # three words are too few to be a question of their own
        ("How many apples has Tom?", "Tell me if you know how many apples has Tom?"),
        ("How many apples has Tom?", "How many apples has Ann?"),
        ("Is the cat in the hall now?", "Was the cat in the hall now?"),
    ],
)
def test_other_questions(question: str, other: str) -> None:
    assert not is_same(example(question), example(other))


def test_what_comes_before_a_question_belongs_to_it_and_its_domain_does_not() -> None:
    question = "And what is its capital?"
    france, spain = (Message("user", f"Tell me of {name}.") for name in ("France", "Spain"))
    said = Message("assistant", "A country.")
    assert is_same(example(question, "", france, said), example(question, "", france, said))
    assert not is_same(example(question, "", france, said), example(question, "", spain, said))
    assert is_same(example(question, domain="a"), example(question, domain="b"))


def test_answers_of_signs_alone_differ() -> None:
    assert len({identify_example(example("Which sign is it?", sign)).answer for sign in ("?", "!", "?!", "")}) == 4
