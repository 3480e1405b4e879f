"""A control changes the prompt alone: what is to be answered stays what it was."""

from __future__ import annotations

from training_lens.data.examples import Example, Message
from training_lens.evaluation.comparison import corrupt_prompts, shuffled_prompts, wrong_domains


def example(question: str, answer: str, domain: str | None = None) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), domain, "f", 1)


DOMAINS = ["x", "y", "x", "z"]
EXAMPLES = [example(f"Q{i}", f"A{i}", domain) for i, domain in enumerate(DOMAINS)]


def test_the_wrong_domain_is_another_one() -> None:
    assert wrong_domains(EXAMPLES) == ["y", "z", "y", "x"]


def test_shuffled_prompts_keep_the_answers_and_no_prompt() -> None:
    shuffled = shuffled_prompts(EXAMPLES, seed=0)
    assert [e.messages[-1] for e in shuffled] == [e.messages[-1] for e in EXAMPLES]
    assert sorted(e.messages[0].text for e in shuffled) == ["Q0", "Q1", "Q2", "Q3"]
    assert all(a.messages[0] != b.messages[0] for a, b in zip(shuffled, EXAMPLES, strict=True))
    assert shuffled == shuffled_prompts(EXAMPLES, seed=0)


def test_every_turn_of_a_chat_is_asked_as_in_another() -> None:
    turns = [
        Message("system", "S"),
        *[m for i in range(2) for m in (Message("user", f"U{i}"), Message("assistant", f"B{i}"))],
    ]
    chat = Example(tuple(turns), None, "f", 9)
    changed = shuffled_prompts([chat, example("Q", "A")], seed=0)
    assert [m.text for m in changed[0].messages] == ["S", "Q", "B0", "Q", "B1"]
    assert changed[1].messages[0].text == "U0"


def test_plain_texts_are_in_no_control_of_prompts() -> None:
    text = Example((Message("assistant", "A story."),), None, "f", 1, is_text=True)
    assert list(corrupt_prompts([text, *EXAMPLES], True, 0)["shuffled_prompts"]) == [1, 2, 3, 4]
    assert corrupt_prompts([text, text], True, 0) == {}


def test_rows_without_a_domain_are_in_no_control_of_domains() -> None:
    changed = corrupt_prompts([example("Q", "A"), *EXAMPLES], True, 0)
    assert {i: e.domain for i, e in changed["wrong_domain"].items()} == {1: "y", 2: "z", 3: "y", 4: "x"}
    assert list(changed["no_domain"]) == [1, 2, 3, 4]
    assert "wrong_domain" not in corrupt_prompts([example("Q", "A"), example("R", "B", "x")], True, 0)


def test_controls_are_those_that_make_sense() -> None:
    assert list(corrupt_prompts(EXAMPLES, True, 0)) == ["wrong_domain", "no_domain", "shuffled_prompts"]
    assert list(corrupt_prompts(EXAMPLES, False, 0)) == ["shuffled_prompts"]
    assert list(corrupt_prompts([example("Q", "A", "x"), example("R", "B", "x")], True, 0)) == ["shuffled_prompts"]
    assert corrupt_prompts(EXAMPLES[:1], True, 0) == {}
