"""Each template is given what it takes, found by trying; what it would lose is refused with its name."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from training_lens.config.data_sections import DataSection
from training_lens.config.schema import ModelSection
from training_lens.data.examples import Example, Message
from training_lens.data.notes import DataNotes
from training_lens.data.source_reader import read_examples
from training_lens.data.templates import build_renderer, load_template_file, resolve_date
from training_lens.data.tokenization import TextEncoder
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.models.factory import load_tokenizer

HEAD = "{% for m in messages %}{% if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}{% else %}<|assistant|>"
TAIL = "{{ eos_token }}{% endif %}{% endfor %}"
SHOWN_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}"
CALL: dict[str, Any] = {"name": "find", "arguments": {"animal": 'an "owl"', "deep": {"n": [1, None, True]}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds <it> & more",
        "parameters": {"type": "object", "properties": {"animal": {"type": "string", "enum": ["owl", "fox"]}}},
    },
}


def renderer_of(tokenizer: Any, source: str | dict[str, str], **data: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = source
    return build_renderer(DataSection(template="chat", **data), changed)


def calling(*, null: bool = True, text: str = "", call: dict[str, Any] = CALL) -> tuple[Message, ...]:
    answer = Message("assistant", text, calls=(call,), null_content=null)
    return (Message("user", "Where?"), answer, Message("tool", "in the oak"), Message("assistant", "In the oak."))


def render(renderer: Any, messages: tuple[Message, ...], tools: tuple[Any, ...] = (TOOL,)) -> tuple[str, set[str]]:
    """The text, and what the user is told."""
    notes = DataNotes()
    segments = renderer.render_example(Example(messages, None, "rows.jsonl", 7, tools), notes)
    return "".join(s.text for s in segments), set(notes.remarks.get("rows.jsonl", {}))


@pytest.mark.parametrize(
    ("style", "shown", "form"),
    [
        ("{{ c.function.arguments | tojson }}", '{"animal": "an \\"owl\\"", "deep": {"n": [1, null, true]}}', "object"),
        ("{{ '' + c.function.arguments }}", '{"animal": "an \\"owl\\"", "deep": {"n": [1, null, true]}}', "text"),
        ("{{ c.function.arguments }}", '{"animal": "an \\"owl\\"", "deep": {"n": [1, null, true]}}', "text"),
        ('{"name": "f", "parameters": {{ c.function.arguments | tojson }}}', '"parameters": {"animal"', "object"),
        (
            "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>{{ v }}</parameter>{% endfor %}",
            '<parameter=animal>an "owl"</parameter>',
            "object",
        ),
        ("{{ c | tojson }}", '"arguments": {"animal": "an \\"owl\\""', "object"),
    ],
)
def test_arguments_go_in_as_the_template_takes_them(embedded_tokenizer: Any, style: str, shown: str, form: str) -> None:
    source = SHOWN_TOOLS + HEAD + CALLS + "<call>{{ c.function.name }} " + style + "</call>{% endfor %}"
    renderer = renderer_of(embedded_tokenizer, source + "{{ m.content or '' }}" + TAIL)
    text, told = render(renderer, calling())
    assert shown in text and renderer.template.form.argument_format == form
    assert any(("JSON text" in remark) == (form == "text") for remark in told if remark.startswith("arguments"))
    learned = renderer.render_example(Example(calling(), None, "f", 1, (TOOL,)))
    assert [s.text[-len("<|end|>") :] for s in learned if s.response] == ["<|end|>"] * 2


NULL = HEAD + "{% if m.content is none %}" + CALLS + "{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content }}"


@pytest.mark.parametrize(
    ("source", "null", "remark"),
    [
        (NULL + "{% endif %}", True, None),
        (NULL + "{% endif %}", False, "goes into the template as null"),
        (HEAD + CALLS + "{{ c.function | tojson }}{% endfor %}{{ m.content }}", True, "as empty text"),
        (HEAD + CALLS + "{{ c.function | tojson }}{% endfor %}{{ m.content + '' }}", True, "as empty text"),
        (HEAD + CALLS + "{{ c.function | tojson }}{% endfor %}{{ m.content or '' }}", True, None),
    ],
)
def test_null_content_stays_null_where_a_template_takes_it(
    embedded_tokenizer: Any, source: str, null: bool, remark: str | None
) -> None:
    text, told = render(renderer_of(embedded_tokenizer, SHOWN_TOOLS + source + TAIL), calling(null=null))
    assert '"name": "find"' in text and "None" not in text
    assert any(remark in t for t in told) if remark else not any("content beside" in t for t in told)


CHECKED = "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
WITH_IDS = HEAD + CALLS + "CHECK{{ c.id }} {{ c.function | tojson }}{% endfor %}{{ m.content or '' }}" + TAIL


@pytest.mark.parametrize(
    ("given", "check", "shown"),
    [
        ("call00000", CHECKED, "call00000"),
        (None, CHECKED, "call00001"),
        ("call_of_OpenAI_with_many_letters", CHECKED, "call00001"),
        ("call_of_OpenAI_with_many_letters", "", "call_of_OpenAI_with_many_letters"),
    ],
)
def test_ids_of_calls_are_kept_or_made_from_their_places(
    embedded_tokenizer: Any, given: str | None, check: str, shown: str
) -> None:
    source = (
        WITH_IDS.replace("CHECK", check) + "{% for m in messages if m.tool_call_id %}[{{ m.tool_call_id }}]{% endfor %}"
    )
    named = {"id": given} if given else {}
    asked, answer, result, last = calling(call={**CALL, **named})
    result = Message("tool", result.text, extra={"tool_call_id": given} if given else {})
    renderer = renderer_of(embedded_tokenizer, source)
    text = "".join(s.text for s in renderer.render_prompt((asked, answer, result), None, (TOOL,)))
    whole, told = render(renderer, (asked, answer, result, last), ())
    assert f"{shown} {{" in text and f"{shown} {{" in whole
    assert any("ids of nine" in t for t in told) == (shown != given)


LOSING = {
    "ignores the calls": SHOWN_TOOLS + HEAD + "{{ m.content or '' }}" + TAIL + "{# tool_calls #}",
    "shows names alone": SHOWN_TOOLS + HEAD + CALLS + "{{ c.function.name }}{% endfor %}{{ m.content or '' }}" + TAIL,
    "drops earlier turns": SHOWN_TOOLS + HEAD.replace("in messages", "in messages[-2:]") + "{{ m.content }}" + TAIL,
    "cuts long texts": SHOWN_TOOLS + HEAD.replace("{{ m.content }}", "{{ m.content[:4] }}") + "{{ m.content }}" + TAIL,
    "shows no tool's text": "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    + HEAD
    + "{{ m.content }}"
    + TAIL,
    "writes small letters": HEAD.replace("m.content", "m.content | lower") + "{{ m.content }}" + TAIL,
}


@pytest.mark.parametrize("what", LOSING)
def test_a_template_that_loses_anything_is_refused_with_its_name(embedded_tokenizer: Any, what: str) -> None:
    chat = (*calling(null=False), Message("user", "Where EXACTLY?"), Message("assistant", "There."))
    chat = chat if "call" in what or "names alone" in what else (chat[0], chat[3], *chat[4:])
    with pytest.raises(
        DatasetError, match=r"rows.jsonl, row 7: the tokenizer's chat template (drops|shows tools)"
    ) as e:
        render(renderer_of(embedded_tokenizer, LOSING[what]), chat)
    assert "data.template=FILE.jinja" in str(e.value)


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        ("Q: {instruction}\\nA: {output}", (Message("system", "S!"), Message("user", "A")), "system message 'S!'"),
        ("Q: {instruction}\\nA: {output}", (Message("user", "A", "Extra"),), "user message 'Extra'"),
        ("plain", (Message("system", "S!"),), "system message 'S!'"),
    ],
)
def test_templates_of_words_lose_nothing_either(
    embedded_tokenizer: Any, template: str, messages: tuple[Message, ...], lost: str
) -> None:
    renderer = build_renderer(DataSection(template=template), embedded_tokenizer)
    with pytest.raises(DatasetError, match=re.escape(lost)):
        renderer.render_example(Example((*messages, Message("assistant", "B")), None, "f", 1))


def test_a_later_system_message_stays_in_its_turn(embedded_tokenizer: Any) -> None:
    turn = (Message("user", "A"), Message("assistant", "B"))
    chat = (*turn, Message("system", "Be long."), *turn)
    for template in ("alpaca", "plain", "{system}\\nQ: {instruction}\\nA: {output}"):
        renderer = build_renderer(DataSection(template=template), embedded_tokenizer)
        texts = [s.text for s in renderer.render_example(Example(chat, None, "f", 1))]
        assert "Be long." in texts[2] and "Be long." not in texts[0]


def test_calls_without_a_place_for_tools_are_in_the_templates_own_form(embedded_tokenizer: Any) -> None:
    source = HEAD + CALLS + "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    text, told = render(renderer_of(embedded_tokenizer, source + "{{ m.content or '' }}" + TAIL), calling())
    assert "<call>find {" in text and text.startswith("<|system|>You may call these tools:")
    assert {t.split(": ", 1)[1] for t in told if "no place" in t} == {"their descriptions go into the system message"}


def test_of_named_templates_the_one_for_tools_is_taken(embedded_tokenizer: Any, tmp_path: Path) -> None:
    tool_use = SHOWN_TOOLS + HEAD + CALLS + "{{ c.function | tojson }}{% endfor %}{{ m.content or '' }}" + TAIL
    named = copy.deepcopy(embedded_tokenizer)
    named.chat_template = {"default": "PLAIN " + HEAD + "{{ m.content }}" + TAIL, "tool_use": tool_use}
    named.save_pretrained(tmp_path)
    for tokenizer in (named, load_tokenizer(ModelSection(), str(tmp_path))):
        renderer = build_renderer(DataSection(template="chat"), tokenizer)
        assert renderer.tool_template.shows_tools and not renderer.template.shows_tools
        assert render(renderer, calling())[0].startswith('[{"type": "function"')
        assert render(renderer, (calling()[0], calling()[3]), ())[0].startswith("PLAIN ")


DATED = "Today is {{ strftime_now('%d %b %Y') }}." + HEAD + "{{ m.content }}" + TAIL


def test_a_template_that_asks_is_told_the_runs_date(embedded_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = DATED
    settled = DataSection(template="chat", date="2026-03-31")
    assert resolve_date(settled, tokenizer) == "2026-03-31"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", resolve_date(DataSection(template="chat"), tokenizer) or "")
    assert resolve_date(DataSection(template="alpaca"), tokenizer) is None
    text = "".join(s.text for s in build_renderer(settled, tokenizer).render_prompt([Message("user", "Hi")], None))
    assert text.startswith("Today is 31 Mar 2026.")


@pytest.mark.parametrize("wrong", ["tomorrow", "31.3.2026", "2026-02-30", "20260331"])
def test_what_is_no_date_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="give one as YYYY-MM-DD"):
        DataSection(date=wrong)


def test_end_marks_that_are_no_tokens_are_told(embedded_tokenizer: Any) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    renderer = renderer_of(embedded_tokenizer, source)
    chat = (Message("user", "Hi"), Message("assistant", "Ho </s> ho"))
    text, told = render(renderer, chat, ())
    assert text.endswith("Ho </s> ho<|end|>")
    assert any("'<|im_end|>', '<|im_start|>', no token of this tokenizer" in t for t in told)
    assert any(t.startswith("'</s>' is no token of this tokenizer") for t in told)


def test_a_text_that_has_its_tokens_already_gets_none_twice(embedded_tokenizer: Any) -> None:
    text = Example((Message("assistant", "<|bos|><|user|>Hi<|assistant|>Ho<|end|>"),), None, "f", 1, is_text=True)
    renderer = build_renderer(DataSection(special_tokens="allow"), embedded_tokenizer)
    ids = TextEncoder(embedded_tokenizer).encode([renderer.render_example(text)])[0].input_ids.tolist()
    assert ids.count(embedded_tokenizer.bos_token_id) == ids.count(embedded_tokenizer.eos_token_id) == 1


# Rows of users beside the template that failed with them.
CASES = {
    "06-string-args-template/concat.jinja": '<call>find_nest\n{"animal": "owl", "deep": true, "why": null}</call>',
    "06-string-args-template/tojson.jinja": '<call>find_nest {"animal": "owl", "deep": true, "why": null}</call>',
    "06-string-args-template/none_content.jinja": '<call>find_nest {"animal": "owl", "deep": true, "why": null}</call>',
    "06-string-args-template/calls_without_tools.jinja": '<call>find_nest {"animal": "owl", "deep": true, "why": null}',
    "07-tool-call-ids/checked_id.jinja": '<call>call00000 find_nest {"animal": "owl"',
    "11-named-templates/tool_use.jinja": '<call>find_nest {"animal": "owl"',
}


@pytest.mark.parametrize("case", CASES)
def test_cases_of_users_show_their_calls(embedded_tokenizer: Any, case: str) -> None:
    template = Path(__file__).parent / "cases" / case
    tokenizer = copy.deepcopy(embedded_tokenizer)
    load_template_file(str(template), tokenizer)
    data = DataSection(train=[str(template.parent / "rows.jsonl")], template=str(template))
    renderer = build_renderer(data, tokenizer)
    examples = list(read_examples([str(data.train[0])], "data.train", data))
    texts = ["".join(s.text for s in renderer.render_example(e) if s.response) for e in examples]
    assert len(texts) == len(examples) > 5
    assert CASES[case] in texts[0] and texts[0].endswith("In the oak.<|end|>")


def test_thoughts_of_earlier_answers_may_be_left_out_and_that_is_told(embedded_tokenizer: Any) -> None:
    said = "{% set t = m.content.split('</think>') %}{{ m.content if loop.last else t[-1] }}" + TAIL
    thinking = Message("assistant", "<think>hm</think>B")
    chat = (Message("user", "A"), thinking, Message("user", "C"), Message("assistant", "<think>ho</think>D"))
    text, told = render(renderer_of(embedded_tokenizer, HEAD + said, supervise="last"), chat, ())
    assert "hm" not in text and "<think>ho</think>D" in text
    assert any("leaves out the thoughts of earlier answers" in t for t in told)
    with pytest.raises(DatasetError, match="takes the answer's thoughts apart"):
        render(renderer_of(embedded_tokenizer, HEAD + said, supervise="all"), chat, ())


def test_names_of_speakers_that_a_template_leaves_out_are_reported(embedded_tokenizer: Any) -> None:
    chat = (Message("user", "Hi", extra={"name": "Alma"}), Message("assistant", "Ho"))
    for shown in (True, False):
        speaker = "{{ m.name }}: " if shown else ""
        source = HEAD.replace("{{ m.content }}", speaker + "{{ m.content }}") + "{{ m.content }}" + TAIL
        text, told = render(renderer_of(embedded_tokenizer, source), chat, ())
        assert ("Alma" in text) == shown == (not any("does not show who speaks" in remark for remark in told))


def test_where_tools_became_text_the_error_says_so(embedded_tokenizer: Any) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + HEAD
    with pytest.raises(DatasetError, match=r"no system.*descriptions go into the system message"):
        render(renderer_of(embedded_tokenizer, source + "{{ m.content }}" + TAIL), calling(null=False))


def test_a_broken_template_of_a_tokenizer_is_refused_with_its_line(embedded_tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match="the tokenizer's chat template, line 2"):
        renderer_of(embedded_tokenizer, "{% for m in messages %}\n{{ m.role }\n{% endfor %}")
