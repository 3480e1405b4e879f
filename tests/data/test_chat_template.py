"""Every chat template that the trl package carries: the text is transformers' own, the answers are found exactly."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
from jinja2 import TemplateError
from slow_cases import slow_but
from trl_templates import TEMPLATES, add_special_tokens

from training_lens.data.chat_template import ChatTemplate, special_token_names
from training_lens.data.completeness import find_lost
from training_lens.data.examples import Example, Message, TextSegment
from training_lens.data.templates import Renderer
from training_lens.errors import DatasetError

ONE = [Message("user", "Hi"), Message("assistant", "Hello there")]
TWO = [
    Message("user", "What is it?"),
    Message("assistant", "One line,\nthen two."),
    Message("user", "More"),
    Message("assistant", "Second answer"),
]
CALL = {"name": "search", "arguments": {"q": "rice"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Looks for it.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "what"}}},
    },
}
CALLING = [
    Message("user", "Hi"),
    Message("assistant", "", calls=(CALL,)),
    Message("tool", "nothing found"),
    Message("assistant", "There is none."),
]


QUICK = list(TEMPLATES)[::3]
# Of a template that trl also has with generation marks, the original alone where these do not matter.
ORIGINALS = pytest.mark.parametrize(
    "tokenizer", slow_but(QUICK, [name for name in TEMPLATES if not name.endswith("_training")]), indirect=True
)


@pytest.fixture(params=slow_but(QUICK, TEMPLATES), scope="module")
def tokenizer(request: pytest.FixtureRequest, embedded_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = TEMPLATES[request.param]
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def template(tokenizer: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer)


@pytest.fixture(scope="module")
def renderer(tokenizer: Any, template: ChatTemplate) -> Renderer:
    """As `build_renderer` makes it, with the template that is compiled and probed already."""
    return Renderer(template, "tag", end=tokenizer.eos_token, special=special_token_names(tokenizer))


def answers(messages: list[Message]) -> list[int]:
    return [i for i, m in enumerate(messages) if m.role == "assistant"]


def own_text(tokenizer: Any, messages: list[Message]) -> str:
    """What transformers renders, with content as text or in parts, as the template wants it."""
    for form in (lambda t: t, lambda t: [{"type": "text", "text": t}]):
        chat = [{"role": m.role, "content": form(m.text)} for m in messages]
        try:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        except TemplateError:
            continue
        if messages[-1].text in text:
            return text
    raise AssertionError("no form works")


def check(tokenizer: Any, template: ChatTemplate, segments: list[TextSegment], messages: list[Message]) -> None:
    text = own_text(tokenizer, messages)
    added = "" if template_closes(tokenizer, text) else tokenizer.eos_token
    assert "".join(s.text for s in segments) == text + added
    for segment, index in zip([s for s in segments if s.response], answers(messages), strict=True):
        said = messages[index].text
        end = segment.text.removeprefix(said)
        assert segment.text.startswith(said) and end
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        assert all(i in specials(tokenizer) for i in ids) and len(ids) <= 2, end


def template_closes(tokenizer: Any, text: str) -> bool:
    last = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"][-1]
    return last in specials(tokenizer)


def specials(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def test_all_templates_of_the_package_are_here() -> None:
    assert len(TEMPLATES) >= 60


def test_text_is_its_own_and_answers_are_exact(tokenizer: Any, template: ChatTemplate) -> None:
    for messages in (ONE, TWO):
        check(tokenizer, template, template.render_example(messages, (), answers(messages)), messages)


def test_the_prompt_is_what_training_puts_before_the_last_answer(tokenizer: Any, template: ChatTemplate) -> None:
    for messages in (ONE, TWO):
        segments = template.render_example(messages, (), answers(messages))
        last = max(i for i, s in enumerate(segments) if s.response)
        asked = template.render_prompt(messages[:-1], ())
        assert "".join(s.text for s in asked) == "".join(s.text for s in segments[:last])


@ORIGINALS
def test_a_system_message_shows_or_is_refused(tokenizer: Any, template: ChatTemplate) -> None:
    messages = [Message("system", "Be brief."), *TWO]
    try:
        segments = template.render_example(messages, (), answers(messages))
    except DatasetError as error:
        assert "system" in str(error).lower()
    else:
        assert "Be brief." in "".join(s.text for s in segments)


@ORIGINALS
def test_calls_are_found_with_their_ends(tokenizer: Any, template: ChatTemplate) -> None:
    if not (template.shows_tools and template.shows_calls):
        pytest.skip("the template has no place for tools")
    call, said = [s.text for s in template.render_example(CALLING, (TOOL,), answers(CALLING)) if s.response]
    assert "search" in call and "rice" in call and "nothing found" not in call
    assert "There is none." in said
    for text in (call, said):
        assert specials(tokenizer) & set(tokenizer(text, add_special_tokens=False)["input_ids"][-1:])


def test_with_tools_the_prompt_is_what_training_puts_before_the_last_answer(
    tokenizer: Any, template: ChatTemplate
) -> None:
    if not (template.shows_tools and template.shows_calls):
        pytest.skip("the template has no place for tools")
    for learned in (answers(CALLING), answers(CALLING)[-1:]):
        segments = template.render_example(CALLING, (TOOL,), learned)
        last = max(i for i, s in enumerate(segments) if s.response)
        asked = template.render_prompt(CALLING[:-1], (TOOL,), learned[:-1])
        assert [s.text for s in asked] == [s.text for s in segments[:last]]


THOUGHTS = [Message("user", "What?"), Message("assistant", "<think>\nhmm\n</think>\n\nyes")]
THINKERS = [name for name, source in TEMPLATES.items() if "</think>" in source]


@pytest.mark.parametrize("tokenizer", slow_but(THINKERS[::3], THINKERS), indirect=True)
def test_thoughts_are_learned_behind_the_generation_prompt_or_refused(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, thinking=True)
    asked = "".join(s.text for s in template.render_prompt(THOUGHTS[:1], ()))
    own = [{"role": "user", "content": "What?"}]
    assert asked == tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    try:
        segments = template.render_example(THOUGHTS, (), [1])
    except DatasetError as error:
        assert "thoughts" in str(error) or "differently" in str(error)
        return
    assert "".join(s.text for s in segments if not s.response).startswith(asked)
    learned = next(s.text for s in segments if s.response)
    assert "hmm" in learned and "yes" in learned


@pytest.mark.parametrize("tokenizer", slow_but(THINKERS[::3], THINKERS), indirect=True)
def test_without_thinking_thoughts_are_shown_as_they_are_or_refused(tokenizer: Any, template: ChatTemplate) -> None:
    try:
        segments = template.render_example(THOUGHTS, (), [1])
    except DatasetError as error:
        assert "data.thinking=true" in str(error)
        return
    asked = "".join(s.text for s in template.render_prompt(THOUGHTS[:1], ()))
    assert "".join(s.text for s in segments if not s.response).startswith(asked)
    assert next(s.text for s in segments if s.response).startswith(THOUGHTS[1].text)


RICH_TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds <it> & more",
        "parameters": {"type": "object", "properties": {"animal": {"type": "string", "enum": ["owl", "fox"]}}},
    },
}
WORDS = ["owl", 'a "quote"', "<tag> & co", "naïve 鳥", "two\nlines", "it's", "back\\slash", "{x}", " edge "]


def make_value(rng: random.Random, depth: int = 2) -> Any:
    kinds: list[Any] = [rng.choice(WORDS), rng.randint(-9, 9), 1.5, True, None]
    if depth:
        kinds += [[make_value(rng, 0)], {rng.choice(["k", "näme", "long_key"]): make_value(rng, depth - 1)}]
    return rng.choice(kinds)


def make_chat(rng: random.Random) -> Example:
    """A valid conversation of random turns, texts, calls and tools."""
    messages = [Message("system", rng.choice(WORDS) + " S")] if rng.random() < 0.4 else []
    tools: tuple[Any, ...] = (RICH_TOOL,) if rng.random() < 0.8 else ()
    for turn in range(rng.randint(1, 3)):
        messages.append(Message("user", f"{rng.choice(WORDS)} {turn}?"))
        if tools and rng.random() < 0.6:
            arguments = {rng.choice(["a", "näme"]): make_value(rng) for _ in range(2)}
            call = {"id": f"call0000{turn}", "name": "find", "arguments": arguments}
            null = rng.random() < 0.5
            said = "" if null or rng.random() < 0.7 else "I look."
            messages.append(Message("assistant", said, calls=(call,), null_content=null))
            extra = {"tool_call_id": call["id"], "name": "find"}
            messages.append(Message("tool", f"{rng.choice(WORDS)} R{turn}", extra=extra))
        messages.append(Message("assistant", f"{rng.choice(WORDS).strip()} A{turn}"))
    return Example(tuple(messages), None, "rows.jsonl", 1, tools)


@ORIGINALS
def test_of_a_random_conversation_everything_is_found_or_it_is_refused(
    request: pytest.FixtureRequest, tokenizer: Any, renderer: Renderer
) -> None:
    rng, used = random.Random(request.node.callspec.params["tokenizer"]), 0
    plain = Example((Message("user", "Hi"), Message("assistant", "Ho")), None, "rows.jsonl", 1)
    for example in (plain, *(make_chat(rng) for _ in range(8))):
        try:
            segments = renderer.render_example(example)
        except DatasetError as error:
            assert "chat template" in str(error) and str(error).startswith("rows.jsonl, row 1: ")
            continue
        used += 1
        text = "".join(s.text for s in segments)
        native = renderer.template.shows_tools and renderer.template.shows_calls
        if native or not example.tools:
            assert find_lost(text, example.messages, example.tools, range(len(example.messages))) is None
        assert all(m.text.strip() in text for m in example.messages if m.role == "assistant")
        learned = [s.text for s in segments if s.response and not s.plain]
        results = [m.text for m in example.messages if m.role == "tool"]
        assert not any(result in one for one in learned for result in results)
        _, said, end = learned[-1].rpartition(example.messages[-1].text)
        assert said and set(tokenizer(end.strip(), add_special_tokens=False)["input_ids"]) <= specials(tokenizer)
    assert used


@ORIGINALS
def test_special_names_in_tools_and_calls_stay_text(tokenizer: Any, template: ChatTemplate, renderer: Renderer) -> None:
    if not template.shows_tools:
        pytest.skip("the template has no place for tools")
    name = next(n for n in sorted(special_token_names(tokenizer)) if "end" in n or "eot" in n)
    counts = []
    for text in ("plain", name):
        tool = {**TOOL, "function": {**TOOL["function"], "description": f"It {text} looks."}}
        call = Message("assistant", "", calls=({"name": "search", "arguments": {"q": text}},))
        chat = [CALLING[0], replace(call, learn=False), *CALLING[2:]]
        try:
            segments = renderer.render_example(Example(tuple(chat), None, "f", 1, (tool,)))
        except DatasetError:
            pytest.skip("the template cannot be trained with calls")
        counts.append("".join(s.text for s in segments if not s.plain).count(name))
    assert counts[0] == counts[1]


def test_a_tool_result_that_is_dropped_is_refused(embedded_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = (
        "{{ tools }}{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}\n"
        "{% elif m.role == 'assistant' %}"
        "A: {{ m.tool_calls }}{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    )
    with pytest.raises(DatasetError, match=r"drops .*the tool message 'nothing found'"):
        ChatTemplate(tokenizer).render_example(CALLING, (TOOL,), [3])


def test_a_dropped_text_is_seen_though_another_holds_it(embedded_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    chat = [Message("system", "cat"), Message("user", "my cat"), Message("assistant", "yes")]
    with pytest.raises(DatasetError, match=r"drops .*the system message 'cat'"):
        ChatTemplate(tokenizer).render_example(chat, (), [2])


def test_a_tokenizer_without_special_tokens_ends(embedded_tokenizer: Any) -> None:
    class Bare:
        chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        eos_token, special_tokens_map = "", {}  # type: ignore[var-annotated]
        added_tokens_decoder, all_special_tokens = {}, []  # type: ignore[var-annotated]

    segments = ChatTemplate(Bare()).render_example(ONE, (), [1])
    assert [s.text for s in segments if s.response] == ["Hello there"]
