"""Scores are counts over all rows; controls and samples are chosen without looking at results."""

from __future__ import annotations

from training_lens.data.types import Example, Message
from training_lens.evaluation.comparison import Answers, compare, samples, wrong_domains
from training_lens.evaluation.evaluator import LossReport


def example(answer: str, domain: str | None) -> Example:
    return Example((Message("user", "Q"), Message("assistant", answer)), domain, "f", 1)


EXAMPLES = [example("a", "x"), example("b", "y"), example("c", "x"), example("d", "z")]
LOSS = LossReport(1.0, 8, {"x": 0.5, "y": 1.0, "z": 2.0})


def test_base_against_adapter_by_domain() -> None:
    base, adapter = (
        Answers(["a", "", "", ""], LOSS),
        Answers(["a", "b", "c", "no"], LossReport(0.25, 8, LOSS.by_domain)),
    )
    result = compare(EXAMPLES, base, adapter, {})
    assert (result.base.exact_match, result.adapter.exact_match) == (0.25, 0.75)
    assert result.by_domain["x"]["base"].exact_match == 0.5
    assert result.by_domain["z"]["adapter"].exact_match == 0.0
    assert result.as_json()["delta"] == {"loss": -0.75, "exact_match": 0.5}


def test_plain_texts_have_no_answers_to_match() -> None:
    texts = [Example((Message("assistant", "A story."),), None, "f", i, is_text=True) for i in range(2)]
    result = compare(texts, *[Answers(["", ""], LossReport(1.0, 8))] * 2, {})
    assert result.base.exact_match is None and result.as_json()["delta"] == {"loss": 0.0, "exact_match": None}


def test_the_wrong_domain_is_another_one() -> None:
    assert wrong_domains(EXAMPLES) == ["y", "z", "y", "x"]


def test_samples_show_each_domain_first() -> None:
    assert samples(EXAMPLES, 3) == [0, 1, 3]
    assert samples(EXAMPLES, 4) == [0, 1, 3, 2]
    assert samples(EXAMPLES[:1], 3) == [0]
