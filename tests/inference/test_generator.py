"""Batched, padded generation says what one prompt at a time says; the base is the base."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from slow_cases import slow_but

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.errors import ConfigurationError
from training_lens.inference.generator import answer, answers, generate_answers
from training_lens.inference.session import Session, open_run
from training_lens.models.factory import load_model
from training_lens.runs.run_folder import RunFolder

PROMPTS = ["Where does the owl live?", "What is 3 plus 4?", "Mia gave Tom 2 red apples in the shop.\nTell all.", "Hi"]


@pytest.fixture(scope="module")
def session(finished_run: RunFolder) -> Session:
    return open_run(finished_run)


@pytest.fixture(scope="module")
def embedded_session(embedded_run: RunFolder) -> Session:
    """Of a model that ends its answers."""
    return open_run(embedded_run)


def ids(session: Session, prompt: str, domain: str | None = "lake") -> list[int]:
    return session.prompt_ids([Message("user", prompt)], domain)


@pytest.mark.parametrize(
    ("max_tokens", "base"), slow_but([(120, False), (10**6, True)], list(product([1, 120, 10**6], [False, True])))
)
def test_batches_equal_single_prompts(session: Session, max_tokens: int, base: bool) -> None:
    prompts = [ids(session, p) for p in PROMPTS]
    settings = InferenceSection(max_new_tokens=24, batch_tokens=max_tokens)
    alone = [answer(session, p, settings, base=base) for p in prompts]
    assert answers(session, prompts, settings, base=base) == alone


def test_answers_end_where_the_positions_end(embedded_session: Session) -> None:
    long = (ids(embedded_session, PROMPTS[0]) * 50)[:480]
    prompts = [ids(embedded_session, PROMPTS[0]), long, long[:-1]]
    settings = InferenceSection(max_new_tokens=100)
    assert embedded_session.positions == 512
    assert answers(embedded_session, prompts, settings) == [answer(embedded_session, p, settings) for p in prompts]
    written = embedded_session.tokenizer(answer(embedded_session, long, settings), add_special_tokens=False)[
        "input_ids"
    ]
    assert len(long) + len(written) <= 512


@pytest.mark.parametrize("own_generate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_answer_tells_whether_it_ended_or_was_cut(
    embedded_session: Session, own_generate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own_generate:
        monkeypatch.setattr(embedded_session.decoders, "get_decoder", lambda *_: None)
    prompts = [ids(embedded_session, p) for p in PROMPTS]
    whole = generate_answers(embedded_session, prompts, InferenceSection(max_new_tokens=300))
    assert {given.finish_reason for given in whole} == {"stop"}
    longest = max(len(given.token_ids) for given in whole)
    cut = generate_answers(embedded_session, prompts, InferenceSection(max_new_tokens=longest))
    assert [given.finish_reason == "length" for given in cut] == [len(g.token_ids) == longest for g in whole]
    assert [given.text for given in cut] == [given.text for given in whole]


def test_samples_are_those_of_seed_and_draw(session: Session) -> None:
    prompts = [ids(session, p) for p in PROMPTS]
    settings = InferenceSection(max_new_tokens=12, temperature=2.0, seed=7)
    one = answers(session, prompts, settings, draw=1)
    assert one == answers(session, prompts, settings, draw=1) != answers(session, prompts, settings, draw=2)


def test_greedy_equals_the_models_own_generate(session: Session) -> None:
    prompt = ids(session, PROMPTS[2])
    base = load_model(session.config.model, torch.device("cpu"), "fp32")
    out = base.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
    wanted = session.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert answer(session, prompt, InferenceSection(max_new_tokens=40), base=True) == wanted


def test_streamed_text_is_the_answer(session: Session) -> None:
    pieces: list[str] = []
    whole = answer(session, ids(session, PROMPTS[0]), InferenceSection(), base=True, on_text=pieces.append)
    assert "".join(pieces).strip() == whole.strip() and len(pieces) > 2


def test_prompts_are_those_of_training(session: Session) -> None:
    text = session.tokenizer.decode(ids(session, "Hi"))
    assert text == "<|bos|><|user|>[domain: lake] Hi<|end|><|assistant|>"
    assert session.domains == ("forest", "hill", "lake")


def test_unknown_domains_and_endless_prompts_are_refused(session: Session) -> None:
    with pytest.raises(ConfigurationError, match=r"domain 'lak': this run knows .* Did you mean 'lake'\?"):
        ids(session, "Hi", "lak")
    with pytest.raises(ConfigurationError, match="no room to answer"):
        ids(session, "word " * 600)


def test_the_end_token_and_eos_stop(session: Session, small_config: Callable[..., Any]) -> None:
    assert session.encoder.eos_id in session.stop_ids
    assert session.tokenizer.convert_tokens_to_ids("<|end|>") in session.stop_ids
