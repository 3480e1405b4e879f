"""Format x template x tokenizer on real files: supervised text round-trips, prompts are those of inference."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_forms import ANSWERS, OWN_FORMS, QUESTIONS  # type: ignore[import-not-found]
from pairwise import pairwise  # type: ignore[import-not-found]
from slow_cases import slow_but
from tiny_models import TINY_TOKENIZERS, build_tiny_tokenizer

from training_lens import embedded
from training_lens.config.data_sections import DataSection
from training_lens.config.schema import ModelSection
from training_lens.data.columns import EncodedRow
from training_lens.data.examples import Example, Message
from training_lens.data.source_reader import read_examples
from training_lens.data.templates import build_renderer, load_template_file
from training_lens.data.tokenization import TextEncoder
from training_lens.models.factory import load_tokenizer

ROWS = 25
FORMATS = {
    "question-answer": "data/gsm8k/train.jsonl",
    "instruction-input-output": "data/llama_factory/alpaca_en_demo.json",
    "instruction-input-response": "data/gpteacher/roleplay.json",
    "prompt-completion": "data/t0_per_template/common_gen_Example_prompt.jsonl",
    "sharegpt-tools": "data/llama_factory/glaive_toolcall_en_demo.json",
    "messages": "data/llama_factory/kto_en_demo.json",
    "messages-loss-weight": "data/llama_factory/v1_sft_demo.jsonl",
    "text": "data/llama_factory/c4_demo.jsonl",
    "domains": embedded.TRAIN,
}
TOKENIZERS = ["models/tinystories-656k", "tokenizers/phi3", "tokenizers/gpt2"]
WITH_CHAT_TEMPLATE = ("embedded", "turns", "tokenizers/phi3")
JINJA = (
    "{% for m in messages %}{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)
PATTERN = "{system}\\nQ: {instruction}\\n{input}\\nA: {output}"
TEMPLATES = ["chat", "jinja", "alpaca", "plain", "pattern"]


def choose_cases(*tokenizers: str) -> list[tuple[Any, ...]]:
    """Tokenizer, form and template, of which each pair meets."""
    return pairwise(
        tokenizers, list(FORMATS), TEMPLATES, allowed=lambda row: row[2] != "chat" or row[0] in WITH_CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "embedded":
        return load_tokenizer(ModelSection())
    if request.param in TINY_TOKENIZERS:
        tokenizer = build_tiny_tokenizer(request.param)
        tokenizer.eos_token = tokenizer.eos_token or "<|endoftext|>"
        return tokenizer
    shared: Path = request.getfixturevalue("shared")
    tokenizer = load_tokenizer(ModelSection(), str(shared / request.param))
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "<|endoftext|>"  # GPT-2's files do not say that it is the end
    return tokenizer


def answers(example: Example) -> list[Message]:
    return [m for m in example.messages if m.role == "assistant"]


@pytest.fixture(scope="module")
def rows(shared: Path) -> dict[str, list[Example]]:
    found = {}
    for name, path in FORMATS.items():
        spec = path if path in embedded.PATHS else str(shared / path)
        learned = (e for e in read_examples([spec], "data.train", DataSection()) if any(m.learn for m in answers(e)))
        found[name] = list(islice(learned, ROWS))
    return found


@pytest.mark.parametrize(
    ("tokenizer", "form", "template"), choose_cases("embedded", *TINY_TOKENIZERS), indirect=["tokenizer"]
)
def test_own_rows_round_trip_and_prompts_are_the_same(
    form: str, template: str, tokenizer: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows([OWN_FORMS[form](q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)])
    examples = list(read_examples([str(path)], "data.train", DataSection()))
    assert len(examples) == len(QUESTIONS)
    check_with_template(form, template, tokenizer, examples, tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "form", "template"),
    slow_but(choose_cases(*TOKENIZERS)[::3], choose_cases(*TOKENIZERS)),
    indirect=["tokenizer"],
)
def test_answers_round_trip_and_prompts_are_the_same(
    form: str, template: str, tokenizer: Any, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    check_with_template(form, template, tokenizer, rows[form], tmp_path)


def check_with_template(form: str, template: str, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    own_template = tokenizer.chat_template
    if template == "jinja":
        (tmp_path / "mine.jinja").write_text(JINJA)
        template = str(tmp_path / "mine.jinja")
        load_template_file(template, tokenizer)
    try:
        check(form, PATTERN if template == "pattern" else template, tokenizer, examples)
    finally:
        tokenizer.chat_template = own_template


def check(form: str, template: str, tokenizer: Any, examples: list[Example]) -> None:
    renderer, encoder = build_renderer(DataSection(template=template), tokenizer), TextEncoder(tokenizer)
    encoded = encoder.encode([renderer.render_example(example) for example in examples])
    unknown = encoder.find_unknown_characters(set().union(*(m.text for e in examples for m in e.messages)))
    exact = 0
    for example, tokens in zip(examples, encoded, strict=True):
        last = runs(tokens)[-1]
        assert tokens.input_ids[: last[0]].tolist() == prompt_ids(
            encoder, renderer.render_example_prompt(example), last[0]
        )
        learned = [said(m) for m in example.messages if m.role == "assistant" and m.learn]
        assert len(runs(tokens)) == len(learned)
        for (start, end), text in zip(runs(tokens), learned, strict=True):
            shown = supervised_text(tokenizer, tokens, start, end - 1)
            assert tokens.input_ids[end - 1] in encoder.special_ids
            assert not any(
                int(i) in encoder.special_ids for i in tokens.input_ids[start : end - 1] if i != tokenizer.unk_token_id
            )
            if not unknown & set(text):
                assert shown.strip() == text.strip(), (form, template)
                exact += 1
    assert exact or unknown


def said(message: Message) -> str:
    """What an assistant says; none of these templates has a place for calls, which are then JSON."""
    return "\n".join(part for part in (message.text, *map(json.dumps, message.calls)) if part)


def prompt_ids(encoder: TextEncoder, segments: Any, length: int) -> list[int]:
    """The prompt's tokens; a plain text has none but BOS."""
    return encoder.encode_prompt(segments) if segments else [encoder.bos_id or 0][:length]


def runs(tokens: EncodedRow) -> list[tuple[int, int]]:
    """The stretches of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.response.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def supervised_text(tokenizer: Any, tokens: EncodedRow, start: int, end: int) -> str:
    """Decoded behind what stands before it: some tokenizers drop a space at the start of what they decode."""
    before = tokenizer.decode(tokens.input_ids[:start], clean_up_tokenization_spaces=False)
    return str(tokenizer.decode(tokens.input_ids[:end], clean_up_tokenization_spaces=False))[len(before) :]
