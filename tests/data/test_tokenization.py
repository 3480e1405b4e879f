"""Supervised tokens are exactly the response and its end; training and inference prompts are the same tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_TOKENIZERS, build_tiny_tokenizer

from training_lens import embedded
from training_lens.config.data_sections import DataSection
from training_lens.config.schema import ModelSection
from training_lens.data.columns import find_learnable_rows, truncate_rows
from training_lens.data.examples import Example, Message, TextSegment
from training_lens.data.templates import Renderer, build_renderer
from training_lens.data.tokenization import CharacterCoverage, TextEncoder
from training_lens.errors import DatasetError, ModelLoadingError
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


@pytest.fixture(params=["embedded", "characters", "turns", "models/tinystories-656k", "tokenizers/phi3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "embedded":
        return load_tokenizer(ModelSection())
    if request.param in TINY_TOKENIZERS:
        return build_tiny_tokenizer(request.param)
    folder: Path = request.getfixturevalue("shared") / request.param
    return load_tokenizer(ModelSection(id=str(folder)), str(folder))


@pytest.fixture(params=["alpaca", "chat"])
def renderer(request: pytest.FixtureRequest, tokenizer: Any) -> Renderer:
    if request.param == "chat" and not tokenizer.chat_template:
        pytest.skip("this tokenizer has no chat template")
    return build_renderer(DataSection(template=request.param), tokenizer)


def in_vocabulary(tokenizer: Any, text: str) -> bool:
    return bool(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text)


def test_supervised_tokens_are_the_answer_and_its_end(tokenizer: Any, renderer: Renderer) -> None:
    encoder = TextEncoder(tokenizer)
    checked = 0
    for prompt, answer in TEXTS:
        if not in_vocabulary(tokenizer, answer):
            continue
        encoded = encoder.encode([renderer.render_example(example(prompt, answer))])[0]
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
        encoded = encoder.encode([renderer.render_example(one)])[0]
        asked = encoder.encode_prompt(renderer.render_prompt(one.messages[:-1], one.domain))
        assert encoded.input_ids[~encoded.response].tolist() == asked


def test_bos_stands_once_at_the_front(tokenizer: Any, renderer: Renderer) -> None:
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode([renderer.render_example(example("Hello", "Tom"))])[0].input_ids.tolist()
    if encoder.bos_id is not None:
        assert ids[0] == encoder.bos_id
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert ids.count(tokenizer.bos_token_id) == 1


def test_multi_turn_chat_supervises_every_answer(embedded_tokenizer: Any) -> None:
    renderer = build_renderer(DataSection(template="chat"), embedded_tokenizer)
    chat = (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "First."),
        Message("user", "Two?"),
        Message("assistant", "Second."),
    )
    segments = renderer.render_example(Example(chat, None, "f", 1))
    assert [s.text for s in segments if s.response] == ["First.<|end|>", "Second.<|end|>"]
    messages = [{"role": m.role, "content": m.text} for m in chat]
    whole = embedded_tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(s.text for s in segments) == whole
    encoded = TextEncoder(embedded_tokenizer).encode([segments])[0]
    assert encoded.input_ids.tolist() == embedded_tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_an_answer_has_one_end_token(embedded_tokenizer: Any) -> None:
    encoder = TextEncoder(embedded_tokenizer)
    for template in ("chat", "alpaca", "plain"):
        renderer = build_renderer(DataSection(template=template), embedded_tokenizer)
        encoded = encoder.encode([renderer.render_example(example("Q", "A"))])[0]
        answer = encoded.input_ids[encoded.response].tolist()
        assert answer.count(encoder.eos_id) == 1 and answer[-1] == encoder.eos_id


def test_the_pad_token_does_not_decide_the_mask() -> None:
    """It pads with <unk>, which real text may hold: such tokens stay targets."""
    tokenizer = build_tiny_tokenizer("characters")
    encoded = TextEncoder(tokenizer).encode([[TextSegment("Q: ", False), TextSegment("a<unk>b</s>", True)]])[0]
    assert tokenizer.pad_token_id in encoded.input_ids[encoded.response]


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ModelLoadingError, match="EOS"):
        TextEncoder(build_tiny_tokenizer("bytes"))


def test_truncation_keeps_the_end_or_the_start_or_drops(embedded_tokenizer: Any) -> None:
    renderer = build_renderer(DataSection(template="chat"), embedded_tokenizer)
    encoder = TextEncoder(embedded_tokenizer)
    rows = encoder.encode([renderer.render_example(example("Q", "one two three four five six"))])
    (whole,), length = rows, len(rows.input_ids) - 3
    (start,) = truncate_rows(rows, length, "keep_start", encoder.bos_id)
    assert start.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert encoder.eos_id not in start.input_ids[start.response]
    (end,) = truncate_rows(rows, length, "keep_end", encoder.bos_id)
    assert len(end.input_ids) == length
    assert end.input_ids[0] == encoder.bos_id and end.input_ids[1:].tolist() == whole.input_ids[4:].tolist()
    assert end.response.sum() == whole.response.sum()
    assert truncate_rows(rows, length, "drop", encoder.bos_id).lengths.tolist() == [0]
    for policy in ("keep_end", "keep_start", "drop"):
        assert truncate_rows(rows, length + 3, policy, encoder.bos_id) is rows  # type: ignore[arg-type]


def test_embedded_names_resolve_to_files() -> None:
    assert all(path.exists() for path in embedded.PATHS.values())


def test_an_answer_without_tokens_is_not_learnable() -> None:
    """It has no Chinese: such a row is dropped and counted, not learned as a bare end token."""
    tokenizer = build_tiny_tokenizer("characters")
    renderer = build_renderer(DataSection(template="alpaca"), tokenizer)
    encoder = TextEncoder(tokenizer)
    encoded = encoder.encode([renderer.render_example(example("Hi", answer)) for answer in ("机器人", "Tom")])
    assert find_learnable_rows(encoded, encoder.special_ids).tolist() == [False, True]


def test_special_names_in_data_give_no_special_tokens(tokenizer: Any, renderer: Renderer) -> None:
    encoder = TextEncoder(tokenizer)
    name = str(tokenizer.eos_token)
    encoded = encoder.encode([renderer.render_example(example(f"Say {name} now", f"One {name} two"))])[0]
    clean = encoder.encode([renderer.render_example(example("Say now", "One two"))])[0]
    specials = [[i for i in e.input_ids.tolist() if i in encoder.special_ids] for e in (encoded, clean)]
    unknown = tokenizer.unk_token_id
    assert [i for i in specials[0] if i != unknown] == specials[1]


def test_characters_without_token_are_found(embedded_tokenizer: Any) -> None:
    encoder = TextEncoder(build_tiny_tokenizer("characters"))
    assert encoder.find_unknown_characters("aZ #*é\n机") == {"é", "机"}
    assert not TextEncoder(build_tiny_tokenizer("turns")).find_unknown_characters("a#机\n")
    coverage = CharacterCoverage(encoder)
    coverage.count_texts(["aébé", "cd"])
    coverage.count_texts(["é"])
    assert (coverage.characters, dict(coverage.unknown)) == (7, {"é": 3})


@pytest.mark.parametrize("text", ["<|bos|><|bos|>", "<|bos|><|bos|>Hi"])
def test_bos_twice_is_refused(embedded_tokenizer: Any, text: str) -> None:
    encoder = TextEncoder(embedded_tokenizer)
    with pytest.raises(DatasetError, match="begins with BOS twice"):
        encoder.encode([[TextSegment("Hi", False)], [TextSegment(text, False)]])


def test_a_tokenizer_that_gives_nothing_is_refused(embedded_tokenizer: Any) -> None:
    from tokenizers import Regex, normalizers

    empty = copy.deepcopy(embedded_tokenizer)
    empty.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    with pytest.raises(ModelLoadingError, match="no tokens at all"):
        TextEncoder(empty)
