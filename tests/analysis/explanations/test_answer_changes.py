"""Why one answer changed, on a real run: the identities of tokens, layers and modules, rows, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from training_lens.analysis.explanations.answer_changes import AnswerChange
from training_lens.analysis.explanations.answer_measurement import find_parting, read_answer_lens
from training_lens.analysis.explanations.answer_question import AnswerQuestion, read_pieces
from training_lens.analysis.explanations.answer_report import (
    build_answer_report,
    describe_answer,
    describe_check,
    token_table,
)
from training_lens.analysis.run_reader import Run
from training_lens.config.schema import PeftSection
from training_lens.errors import ConfigurationError
from training_lens.inference.session import open_run
from training_lens.models.adapters import attach, base_only, trainable_parameters

PROMPT = "Where is the key?"


@pytest.fixture(scope="module")
def change(embedded_run: Any) -> AnswerChange:
    found: AnswerChange = Run(embedded_run.root).explain.answer(PROMPT, max_new_tokens=12)
    return found


def test_tokens_have_the_log_probabilities_of_both_models(embedded_run: Any, change: AnswerChange) -> None:
    """Teacher-forced on the adapter's greedy answer: under the adapter its own tokens are the likeliest."""
    session = open_run(embedded_run)
    assert change.source == "greedy" and change.answer == change.adapter_answer
    assert change.answer == Run(embedded_run.root).answer(PROMPT, max_new_tokens=12)
    assert all(token.adapter_top == token.text or token.text in ("", token.adapter_top) for token in change.tokens[1:])
    ids = torch.tensor([session.prompt_ids([message()]) + [token.id for token in change.tokens]])
    with torch.inference_mode():
        of_adapter = session.model(input_ids=ids).logits.log_softmax(-1)
        with base_only(session.model):
            of_base = session.model(input_ids=ids).logits.log_softmax(-1)
    first = ids.shape[1] - len(change.tokens)
    for i, token in enumerate(change.tokens):
        assert token.base_logp == pytest.approx(float(of_base[0, first + i - 1, token.id]), abs=1e-4)
        assert token.adapter_logp == pytest.approx(float(of_adapter[0, first + i - 1, token.id]), abs=1e-4)
        assert token.change == token.adapter_logp - token.base_logp
    assert change.token == int(np.argmax([abs(token.change) for token in change.tokens]))


def message() -> Any:
    from training_lens.data.examples import Message

    return Message("user", PROMPT)


def test_the_last_layers_lens_is_the_model(change: AnswerChange) -> None:
    assert change.layers is not None
    last, token = change.layers.layers[-1], change.tokens[change.token]
    assert last.token_kl == pytest.approx(token.kl, rel=1e-5)
    assert last.kl == pytest.approx(np.mean([t.kl for t in change.tokens]), rel=1e-5)
    assert (last.base_logp, last.adapter_logp) == pytest.approx((token.base_logp, token.adapter_logp), abs=1e-5)


def test_module_shares_sum_to_the_change_of_the_token_and_of_the_answer(change: AnswerChange) -> None:
    assert change.at_token.change == pytest.approx(-change.tokens[change.token].change, abs=1e-3)
    assert change.whole.change == pytest.approx(-change.change, abs=1e-3)
    for part in (change.at_token, change.whole):
        total = sum(module.share for module in part.modules)
        assert part.is_complete and total == pytest.approx(part.change, rel=0.0101)


@pytest.mark.slow
def test_a_given_answer_and_a_row_are_explained_as_training_has_them(finished_run: Any) -> None:
    run = Run(finished_run.root)
    given = run.explain.answer(AnswerQuestion(PROMPT, answer="In the box.", token=1), max_new_tokens=4)
    assert given.source == "given" and given.token == 1
    assert "".join(token.text for token in given.tokens).startswith("In the box.")
    session = open_run(finished_run)
    assert given.tokens[-1].id in session.stop_ids  # the end of the answer is explained as well
    own = run.explain.answer(AnswerQuestion(row=row_id(finished_run), own_answer=True), max_new_tokens=4)
    assert own.source == "row" and own.row == row_id(finished_run) and own.prompt
    assert "".join(token.text for token in own.tokens).startswith(own.answer)


def row_id(run: Any) -> str:
    """The id of the run's first training row."""
    from training_lens.analysis.explanations.answer_question import find_row

    session = open_run(run)
    with pytest.raises(ConfigurationError) as refused:
        find_row(run, session, "nothing.jsonl:1")
    assert "there is no such row" in str(refused.value)
    return str(refused.value).split("For example: ")[1].split(" ")[0].rstrip(".")


@pytest.mark.slow
def test_a_plain_text_is_explained_whole(text_run: Any) -> None:
    found = Run(text_run.root).explain.answer(AnswerQuestion(row=row_id(text_run)), max_new_tokens=2)
    assert found.source == "row" and found.prompt == "" and len(found.tokens) > 3
    continued = Run(text_run.root).explain.answer(AnswerQuestion("The cat", answer=" sat"), max_new_tokens=2)
    assert "".join(token.text for token in continued.tokens) == " sat"


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        (AnswerQuestion(), "takes a prompt or --row ID"),
        (AnswerQuestion("a", row="b"), "takes a prompt or --row ID"),
        (AnswerQuestion(" "), "the prompt is empty"),
        (AnswerQuestion("a", answer=" "), "--answer is empty"),
        (AnswerQuestion("a", own_answer=True), "--own-answer is the answer of --row"),
        (AnswerQuestion(row="a", domain="b"), "a row has its own domain"),
        (AnswerQuestion(row="rows.jsonl:0"), "there is no such row"),
        (AnswerQuestion("a", domain="nowhere"), "domain 'nowhere'"),
        (AnswerQuestion("a" * 20000), "no room to answer"),
        (AnswerQuestion("a", answer="b " * 20000), "Shorten the answer"),
    ],
    ids=str,
)
def test_what_cannot_be_explained_is_refused(finished_run: Any, question: AnswerQuestion, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        Run(finished_run.root).explain.answer(question, max_new_tokens=2)


def test_a_token_that_is_none_is_refused(finished_run: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"--token 99: the answer has \d+ tokens"):
        Run(finished_run.root).explain.answer(AnswerQuestion(PROMPT, token=98), max_new_tokens=2)


def test_base_and_adapter_part_where_the_divergence_stays() -> None:
    kl = torch.tensor([[0.0], [0.6], [0.2], [0.5], [1.0]])
    assert find_parting(kl) == 3 and find_parting(kl[:2]) == 1 and find_parting(kl[1:2]) == 0
    assert find_parting(torch.zeros(3, 2)) is None


class TinySession:
    """What the lens reads of a session."""

    def __init__(self, model: Any) -> None:
        self.model, self.device, self.precision = model, torch.device("cpu"), "fp32"


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT", "Gemma2", "Phi3", "Cohere"])
def test_the_lens_ends_with_the_model_of_every_kind(kind: str) -> None:
    """Whatever comes after the last layer: norms, biases, soft caps, scaled logits; and B = 0 parts nowhere."""
    model = attach(tiny_model(kind), PeftSection(r=2)).eval()
    ids, places = torch.arange(3, 15), torch.tensor([4, 5, 9])
    nothing = read_answer_lens(TinySession(model), ids, places)  # type: ignore[arg-type]
    assert nothing.layers is not None and not nothing.layers.kl.any() and not nothing.final.kl.any()
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.1
    lens = read_answer_lens(TinySession(model), ids, places)  # type: ignore[arg-type]
    assert lens.layers is not None and lens.layers.kl.shape == (2, 3)
    assert torch.allclose(lens.layers.kl[-1], lens.final.kl, rtol=1e-4, atol=1e-7)
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0, places - 1].log_softmax(-1)
    assert torch.allclose(lens.final.adapter_logp, logits.gather(1, ids[places, None])[:, 0].double(), atol=1e-5)


def test_pieces_joined_are_the_text_of_all_tokens(finished_run: Any) -> None:
    session = open_run(finished_run)
    for text in ("The cat sat.\n  Twice!", "naïve — 猫 🐈 x"):
        ids = session.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(read_pieces(session, ids)) == session.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_page_shows_hostile_text_as_text_in_every_form(change: AnswerChange, tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script>'
    tokens = (replace(change.tokens[0], text=hostile, base_top=hostile), *change.tokens[1:])
    shown = replace(change, tokens=tokens, prompt=hostile, base_answer=hostile, token=0)
    build_answer_report(shown).write_all(tmp_path, "explain-answer", token_table(shown))
    page = (tmp_path / "explain-answer.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4 and page.count("<svg") == 3
    assert "<script" not in (tmp_path / "explain-answer.md").read_text()
    assert json.loads((tmp_path / "explain-answer.json").read_text())["rows"] is None
    assert len((tmp_path / "explain-answer.csv").read_text().splitlines()) == len(change.tokens) + 1
    largest = token_table(shown, 1)
    assert [row[0] for row in largest.rows] == [str(change.token + 1)] and "1 largest" in largest.caption
    assert any("log-probability by" in line for line in describe_answer(change))


def test_shares_that_do_not_sum_are_inconclusive(change: AnswerChange) -> None:
    rough = replace(change.at_token, residual=0.2, is_complete=False, points=32)
    assert describe_check(rough).startswith("inconclusive") and describe_check(change.at_token).startswith("complete")
    assert not any("largest share" in line for line in describe_answer(replace(change, at_token=rough)))
