"""One renderer for all; domains show as configured, the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training_lens.config.schema import ModelSection
from training_lens.data.templates import AlpacaTemplate, build_renderer, choose_template, domain_prefix
from training_lens.data.types import Example, Message
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.models.factory import load_tokenizer


def test_domain_prefix_styles() -> None:
    assert domain_prefix("law", "tag") == "[domain: law] "
    assert domain_prefix("law", "none") == ""
    assert domain_prefix(None, "tag") == ""
    hashed = domain_prefix("law", "hash")
    assert hashed == domain_prefix("law", "hash") != domain_prefix("tax", "hash")
    assert len(hashed) == len("[12345678] ")


def test_the_domain_goes_on_the_first_user_message(embedded_tokenizer: Any) -> None:
    renderer = build_renderer("chat", "tag", embedded_tokenizer)
    messages = [Message("system", "S"), Message("user", "A"), Message("assistant", "B"), Message("user", "C")]
    text = "".join(s.text for s in renderer.prompt(messages, "law"))
    assert text.count("[domain: law] ") == 1
    assert "<|user|>[domain: law] A<|end|>" in text


def test_alpaca_with_and_without_input() -> None:
    template = AlpacaTemplate()
    bare = template.prompt([Message("user", "Do it.")])[0].text
    assert bare.endswith("### Instruction:\nDo it.\n\n### Response:\n")
    assert "### Input" not in bare
    given = template.prompt([Message("user", "Do it.", "With this.")])[0].text
    assert given.endswith("### Instruction:\nDo it.\n\n### Input:\nWith this.\n\n### Response:\n")
    assert "paired with an input" in given


def test_auto_takes_the_chat_template_where_there_is_one(embedded_tokenizer: Any, shared: Path) -> None:
    plain = load_tokenizer(ModelSection(), str(shared / "models/tinystories-656k"))
    assert choose_template("auto", embedded_tokenizer) == "chat"
    assert choose_template("auto", plain) == "alpaca"
    with pytest.raises(ConfigurationError, match=r"data\.template"):
        choose_template("chat", plain)


def test_phi3_response_ends_at_its_turn_mark(shared: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(), str(shared / "tokenizers/phi3"))
    renderer = build_renderer("chat", "none", tokenizer)
    example = Example((Message("user", "Hi"), Message("assistant", "Hello there")), None, "f", 1)
    assert renderer.example(example)[-1].text == "Hello there<|end|>"


def test_a_template_that_rewrites_answers_is_refused_with_the_row(embedded_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    renderer = build_renderer("chat", "none", tokenizer)
    with pytest.raises(DatasetError, match=r"rows.jsonl, row 7: .*changes the assistant's text"):
        renderer.example(Example((Message("user", "Hi"), Message("assistant", "Hello")), None, "rows.jsonl", 7))


def test_a_template_that_refuses_a_role_names_the_row(embedded_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tokenizer.chat_template
    )
    renderer = build_renderer("chat", "none", tokenizer)
    chat = (Message("system", "S"), Message("user", "Hi"), Message("assistant", "Hello"))
    with pytest.raises(DatasetError, match=r"row 3: the chat template refuses .*no system"):
        renderer.example(Example(chat, None, "rows.jsonl", 3))
