"""A chat template becomes one of Ollama's exactly where a prompt is made of pieces around each message."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Template
from tiny_models import TURNS

from training_lens.adapter_export.modelfile import Render, find_chat_pieces
from training_lens.data.examples import Message


def renderer(template: str) -> Render:
    compiled = Template(template)

    def render(messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        return str(compiled.render(messages=turns, add_generation_prompt=True))

    return render


def test_a_chat_of_turns_is_written_in_go() -> None:
    pieces = find_chat_pieces(renderer(TURNS))
    assert pieces is not None
    assert pieces.as_go_template() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|system|>\n{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n<|assistant|>\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|end|>\n{{ end }}{{ end }}'
    )


def test_a_system_message_that_moves_into_the_users_is_left_out() -> None:
    inside = (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]"
        "{% if loop.first and messages[0].role == 'system' %}"
        "{{ messages[0].content }}!{% endif %}{{ m.content }}\n{% endfor %}[assistant]"
    )
    pieces = find_chat_pieces(renderer(inside))
    assert pieces is not None and pieces.around_system is None


def test_a_template_that_counts_turns_is_not_translated() -> None:
    counting = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert find_chat_pieces(renderer(counting)) is None
