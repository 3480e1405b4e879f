"""However an answer is cut into tokens, its pieces are its text up to the first stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY_TOKENIZERS, build_tiny_tokenizer

from training_lens.serve.text_stream import TextStream

TOKENIZERS = {kind: build_tiny_tokenizer(kind) for kind in TINY_TOKENIZERS}


def stream(tokenizer: Any, tokens: list[int], stops: list[str]) -> tuple[str, bool]:
    text = TextStream(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), stops)
    given = ""
    for token in tokens:
        given += text.add_token(token)
        if text.has_stopped:
            return given, True
    given += text.finish()
    return given, text.has_stopped


@pytest.mark.parametrize("kind", ["turns", "bytes"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_text_before_the_first_stop(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    text = data.draw(st.text("abc \u00e9\N{PILE OF POO}\u6f22", max_size=30))
    stops = data.draw(st.lists(st.text("abc\u00e9\N{PILE OF POO}", min_size=1, max_size=4), max_size=3))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    streamed, has_stopped = stream(tokenizer, tokens, stops)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert has_stopped == bool(places)
    if not places:
        assert streamed == whole
    else:  # a stop string that ends first is found first, though another one may begin before it
        assert any(streamed == whole[:place] for place in places) and whole.startswith(streamed)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    text = TextStream(lambda ids: "".join(map(chr, ids)), ["END", "ENTER"])
    assert [text.add_token(ord(letter)) for letter in "an EN"] == ["a", "n", " ", "", ""]
    assert text.add_token(ord("x")) == "ENx" and text.add_token(ord("E")) == "" and text.finish() == "E"
