"""One renderer for all; domains show as configured, the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_tiny_tokenizer

from training_lens.config.data_sections import DataSection
from training_lens.data.examples import Example, Message
from training_lens.data.templates import (
    build_renderer,
    choose_template,
    domain_prefix,
    load_template_file,
)
from training_lens.data.turn_templates import AlpacaTemplate
from training_lens.errors import ConfigurationError, DatasetError


def test_domain_prefix_styles() -> None:
    assert domain_prefix("law", "tag") == "[domain: law] "
    assert domain_prefix("law", "none") == ""
    assert domain_prefix(None, "tag") == ""
    hashed = domain_prefix("law", "hash")
    assert hashed == domain_prefix("law", "hash") != domain_prefix("tax", "hash")
    assert len(hashed) == len("[12345678] ")


def test_the_domain_goes_on_the_first_user_message(embedded_tokenizer: Any) -> None:
    renderer = build_renderer(DataSection(template="chat"), embedded_tokenizer)
    messages = [Message("system", "S"), Message("user", "A"), Message("assistant", "B"), Message("user", "C")]
    text = "".join(s.text for s in renderer.render_prompt(messages, "law"))
    assert text.count("[domain: law] ") == 1
    assert "<|user|>[domain: law] A<|end|>" in text


def test_alpaca_with_and_without_input() -> None:
    template = AlpacaTemplate("</s>")
    bare = template.render_prompt([Message("user", "Do it.")], ())[0].text
    assert bare.endswith("### Instruction:\nDo it.\n\n### Response:\n")
    assert "### Input" not in bare
    given = template.render_prompt([Message("user", "Do it.", "With this.")], ())[0].text
    assert given.endswith("### Instruction:\nDo it.\n\n### Input:\nWith this.\n\n### Response:\n")
    assert "paired with an input" in given


def test_auto_takes_the_chat_template_where_there_is_one(embedded_tokenizer: Any) -> None:
    plain = build_tiny_tokenizer("characters")
    assert choose_template("auto", embedded_tokenizer) == "chat"
    assert choose_template("auto", plain) == "alpaca"
    with pytest.raises(ConfigurationError, match=r"data\.template"):
        choose_template("chat", plain)


def test_a_response_ends_at_its_turn_mark() -> None:
    renderer = build_renderer(DataSection(template="chat"), build_tiny_tokenizer("turns"))
    example = Example((Message("user", "Hi"), Message("assistant", "Hello there")), None, "f", 1)
    assert renderer.render_example(example)[-1].text == "Hello there<|end|>"


def test_a_template_that_rewrites_answers_is_refused_with_the_row(embedded_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(embedded_tokenizer)
    shouted = "m.content | upper if m.role == 'assistant' else m.content"
    tokenizer.chat_template = f"{{% for m in messages %}}<|{{{{ m.role }}}}|>{{{{ {shouted} }}}}<|end|>{{% endfor %}}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    renderer = build_renderer(DataSection(template="chat"), tokenizer)
    with pytest.raises(DatasetError, match=r"rows.jsonl, row 7: .*changes the assistant's text"):
        renderer.render_example(Example((Message("user", "Hi"), Message("assistant", "Hello")), None, "rows.jsonl", 7))


def test_a_template_that_refuses_a_role_names_the_row(embedded_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tokenizer.chat_template
    )
    renderer = build_renderer(DataSection(template="chat"), tokenizer)
    chat = (Message("system", "S"), Message("user", "Hi"), Message("assistant", "Hello"))
    with pytest.raises(DatasetError, match=r"row 3: the tokenizer's chat template refuses .*no system"):
        renderer.render_example(Example(chat, None, "rows.jsonl", 3))


def rendered(template: str, tokenizer: Any, *messages: Message, **data: Any) -> list[str]:
    """The segments' texts; responses in brackets."""
    renderer = build_renderer(DataSection(template=template, **data), tokenizer)
    segments = renderer.render_example(Example(messages, None, "f.jsonl", 1))
    return [f"[{s.text}]" if s.response else s.text for s in segments]


CHAT = (Message("system", "S"), Message("user", "A", "I"), Message("assistant", "B"))
TWO_TURNS = (*CHAT, Message("user", "C"), Message("assistant", "D"))


def test_plain_and_patterns_are_the_words_alone(embedded_tokenizer: Any) -> None:
    assert rendered("plain", embedded_tokenizer, *CHAT) == ["S\nA\nI\n", "[B<|end|>]"]
    assert rendered("plain", embedded_tokenizer, *TWO_TURNS)[2:] == ["\n\nC\n", "[D<|end|>]"]
    pattern = "{system}\\nQ: {instruction}\\nText: {input}\\nA: {output}"
    assert rendered(pattern, embedded_tokenizer, *CHAT) == ["S\nQ: A\nText: I\nA: ", "[B<|end|>]"]
    assert rendered(pattern, embedded_tokenizer, *CHAT[1:]) == ["Q: A\nText: I\nA: ", "[B<|end|>]"]
    bare = (Message("user", "{input}"), Message("assistant", "B"))
    assert rendered(pattern, embedded_tokenizer, *bare) == ["Q: {input}\nA: ", "[B<|end|>]"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("Q: {question}\\nA: {output}", r"has the slot \{question\}"),
        ("Q: {instruction}\\nA:", r"needs \{instruction\}, and \{output\} once"),
        ("{output} {instruction}", r"must end with \{output\}"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(embedded_tokenizer: Any, pattern: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_renderer(DataSection(template=pattern), embedded_tokenizer)


def test_supervise_last_and_loss_weight_choose_the_answers(embedded_tokenizer: Any) -> None:
    for template in ("chat", "alpaca"):
        learned = [t for t in rendered(template, embedded_tokenizer, *TWO_TURNS, supervise="last") if t[0] == "["]
        assert learned == ["[D<|end|>]"]
        muted = (*CHAT, Message("user", "C"), Message("assistant", "D", learn=False))
        learned = [t for t in rendered(template, embedded_tokenizer, *muted) if t[0] == "["]
        assert learned == ["[B<|end|>]"]


def test_names_of_special_tokens_in_data_stay_text(embedded_tokenizer: Any) -> None:
    said = (Message("user", "Say <|end|>"), Message("assistant", "a <|end|> b"))
    for template in ("chat", "alpaca", "plain"):
        renderer = build_renderer(DataSection(template=template), embedded_tokenizer)
        segments = renderer.render_example(Example(said, None, "f", 1))
        assert [s.text for s in segments if s.plain] == ["<|end|>"] * 2
        assert "".join(s.text for s in segments if s.response) == "a <|end|> b<|end|>"
        allowed = build_renderer(DataSection(template=template, special_tokens="allow"), embedded_tokenizer)
        assert not any(s.plain for s in allowed.render_example(Example(said, None, "f", 1)))


def test_a_template_file_is_adopted_or_refused_with_its_line(embedded_tokenizer: Any, tmp_path: Path) -> None:
    import copy

    tokenizer = copy.deepcopy(embedded_tokenizer)
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}")
    load_template_file(str(file), tokenizer)
    assert rendered(str(file), tokenizer, *CHAT) == ["system: S<|end|>\nuser: A\nI<|end|>\nassistant: ", "[B<|end|>]"]
    file.write_text("{% for m in messages %}\n{{ m.role }\n{% endfor %}")
    with pytest.raises(ConfigurationError, match=r"mine\.jinja, line 2"):
        load_template_file(str(file), tokenizer)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_template_file(str(tmp_path / "none.jinja"), tokenizer)


def with_template(tokenizer: Any, source: str) -> Any:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = source
    return changed


def test_a_template_that_drops_the_system_message_is_refused(embedded_tokenizer: Any) -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(DatasetError, match=r"drops .*the system message 'S'"):
        rendered("chat", with_template(embedded_tokenizer, source), *CHAT)


def test_a_template_that_shows_no_content_is_refused(embedded_tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot be trained with"):
        build_renderer(DataSection(), with_template(embedded_tokenizer, "{{ bos_token }}hello"))


def test_a_template_cannot_reach_out_of_its_sandbox(embedded_tokenizer: Any) -> None:
    source = "{{ messages.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigurationError, match=r"unsafe|cannot be trained"):
        build_renderer(DataSection(), with_template(embedded_tokenizer, source))


def test_tools_become_text_where_a_template_has_no_place_for_them(embedded_tokenizer: Any) -> None:
    call = {"name": "search", "arguments": {}}
    chat = (
        Message("user", "A"),
        Message("assistant", '{"name": "search"}', calls=(call,)),
        Message("tool", "[]"),
        Message("assistant", "None."),
    )
    tool = {"type": "function", "function": {"name": "search"}}
    renderer = build_renderer(DataSection(template="alpaca"), embedded_tokenizer)
    text = "".join(s.text for s in renderer.render_example(Example(chat, None, "f", 1, (tool,))))
    assert text.startswith('You may call these tools:\n{"name": "search"}') and "### Instruction:\n[]" in text
