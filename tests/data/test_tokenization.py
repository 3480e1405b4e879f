"""Supervised tokens are exactly the response and its end; training and inference prompts are the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training_lens import embedded
from training_lens.config.schema import ModelSection
from training_lens.data.templates import Renderer, build_renderer
from training_lens.data.tokenization import TextEncoder, fit
from training_lens.data.types import Example, Message, Segment
from training_lens.errors import ModelLoadingError
from training_lens.models.factory import load_tokenizer

TEXTS = [
    ("What is it?", "A lamp."),
    ("Two lines\nof prompt", "Tom ran.\nThen he sat."),
    ("Blank line first", "\nTom"),
    ("Ends with a space ", "one two  three"),
    ("Zahlen und Umlaute: äöü 123", "größer als 7"),
]


def example(prompt: str, answer: str, domain: str | None = None) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)), domain, "rows.jsonl", 1)


@pytest.fixture(params=["embedded", "models/tinystories-656k", "tokenizers/phi3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "embedded":
        return load_tokenizer(ModelSection())
    folder: Path = request.getfixturevalue("shared") / request.param
    return load_tokenizer(ModelSection(id=str(folder)), str(folder))


@pytest.fixture(params=["alpaca", "chat"])
def renderer(request: pytest.FixtureRequest, tokenizer: Any) -> Renderer:
    if request.param == "chat" and not tokenizer.chat_template:
        pytest.skip("this tokenizer has no chat template")
    return build_renderer(request.param, "tag", tokenizer)


def in_vocabulary(tokenizer: Any, text: str) -> bool:
    return bool(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text)


def test_supervised_tokens_are_the_answer_and_its_end(tokenizer: Any, renderer: Renderer) -> None:
    encoder = TextEncoder(tokenizer)
    checked = 0
    for prompt, answer in TEXTS:
        if not in_vocabulary(tokenizer, answer):
            continue
        encoded = encoder.encode([renderer.example(example(prompt, answer))])[0]
        supervised = encoded.input_ids[encoded.response].tolist()
        assert tokenizer.decode(supervised[:-1]) == answer
        assert supervised[-1] in encoder.special_ids
        assert not any(i in encoder.special_ids for i in supervised[:-1])
        checked += 1
    assert checked >= 3


def test_prompt_is_the_same_at_training_and_inference(tokenizer: Any, renderer: Renderer) -> None:
    encoder = TextEncoder(tokenizer)
    for prompt, answer in TEXTS:
        one = example(prompt, answer, "law")
        encoded = encoder.encode([renderer.example(one)])[0]
        asked = encoder.prompt_ids(renderer.prompt(one.messages[:-1], one.domain))
        assert encoded.input_ids[~encoded.response].tolist() == asked


def test_bos_stands_once_at_the_front(tokenizer: Any, renderer: Renderer) -> None:
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode([renderer.example(example("Hello", "Tom"))])[0].input_ids.tolist()
    if encoder.bos_id is not None:
        assert ids[0] == encoder.bos_id
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert ids.count(tokenizer.bos_token_id) == 1


def test_multi_turn_chat_supervises_every_answer(embedded_tokenizer: Any) -> None:
    renderer = build_renderer("chat", "none", embedded_tokenizer)
    chat = (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "First."),
        Message("user", "Two?"),
        Message("assistant", "Second."),
    )
    segments = renderer.example(Example(chat, None, "f", 1))
    assert [s.text for s in segments if s.response] == ["First.<|end|>", "Second.<|end|>"]
    messages = [{"role": m.role, "content": m.text} for m in chat]
    whole = embedded_tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(s.text for s in segments) == whole
    encoded = TextEncoder(embedded_tokenizer).encode([segments])[0]
    assert encoded.input_ids.tolist() == embedded_tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_response_without_end_token_gets_eos_once(embedded_tokenizer: Any) -> None:
    encoder = TextEncoder(embedded_tokenizer)
    ids = encoder.encode([[Segment("Q", False), Segment("A", True)]])[0].input_ids.tolist()
    assert ids.count(encoder.eos_id) == 1 and ids[-1] == encoder.eos_id
    ids = encoder.encode([[Segment("Q", False), Segment("A<|end|>", True)]])[0].input_ids.tolist()
    assert ids.count(encoder.eos_id) == 1


def test_the_pad_token_does_not_decide_the_mask(shared: Path) -> None:
    """tinystories pads with <unk>, which real text may hold: such tokens stay targets."""
    tokenizer = load_tokenizer(ModelSection(id=str(shared / "models/tinystories-656k")))
    encoded = TextEncoder(tokenizer).encode([[Segment("Q: ", False), Segment("a<unk>b", True)]])[0]
    assert tokenizer.pad_token_id in encoded.input_ids[encoded.response]


def test_a_tokenizer_without_eos_is_refused(shared: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(), str(shared / "tokenizers/gpt2"))
    with pytest.raises(ModelLoadingError, match="EOS"):
        TextEncoder(tokenizer)


def test_a_cut_answer_loses_its_end_token(embedded_tokenizer: Any) -> None:
    renderer = build_renderer("chat", "none", embedded_tokenizer)
    encoder = TextEncoder(embedded_tokenizer)
    whole = encoder.encode([renderer.example(example("Q", "one two three four five six"))])[0]
    cut = fit(whole, len(whole.input_ids) - 2)
    assert encoder.eos_id not in cut.input_ids[cut.response]
    assert len(cut.input_ids) == len(cut.response) == len(whole.input_ids) - 2


def test_embedded_names_resolve_to_files() -> None:
    assert all(path.exists() for path in embedded.PATHS.values())


def test_an_answer_without_tokens_is_left_empty(shared: Path) -> None:
    """tinystories has no Chinese: such a row is dropped and counted, not learned as a bare end token."""
    tokenizer = load_tokenizer(ModelSection(), str(shared / "models/tinystories-656k"))
    renderer = build_renderer("alpaca", "none", tokenizer)
    assert not TextEncoder(tokenizer).encode([renderer.example(example("Hi", "机器人"))])[0].response.any()
