"""A template that never ends, or makes a text without end, is an error; the others render as ever."""

from __future__ import annotations

import time
from datetime import date

import pytest
from jinja2.exceptions import TemplateError
from slow_cases import mark_slow

from training_lens.data import jinja_limits
from training_lens.data.jinja import JinjaTemplate
from training_lens.errors import ConfigurationError

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
DOUBLE = "{%% set ns = namespace(s=%s) %%}{%% for i in range(60) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s }}"


def render(source: str) -> str:
    return JinjaTemplate(source, {"eos_token": "</s>"}, date(2026, 1, 1)).render_chat(CHAT, ())[0]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        mark_slow("{% for i in range(99999) %}{{ range(99999)|map('string')|map('upper')|list|length }}{% endfor %}"),
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for i in [messages] recursive %}{{ loop([messages, messages]) }}{% endfor %}",
        "{% for i in range(99999) %}{% set x = 'a' * 1000000 == 'b' * 1000000 %}{% endfor %}",
    ],
)
def test_rendering_ends_in_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_limits, "TEMPLATE_SECONDS", 0.3)
    began = time.process_time()  # of this process alone: others may hold the processor
    with pytest.raises((TemplateError, RecursionError)):
        render(source)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ ([1] * 10000000000)|length }}",
        "{{ 9 ** (9 ** 9) }}",
        DOUBLE % ("99", "ns.s * ns.s"),
        DOUBLE % ("'ab'", "ns.s + ns.s"),
        DOUBLE % ("'ab'", "ns.s ~ ns.s"),
        DOUBLE % ("'ab'", "ns.s|replace('a', ns.s)"),
        DOUBLE % ("'ab'", "ns.s.replace('a', ns.s)"),
        DOUBLE % ("'ab'", "ns.s.join([ns.s] * 9)"),
        DOUBLE % ("'ab'", "[ns.s, ns.s]|join"),
        DOUBLE % ("'ab'", "'%s%s' % (ns.s, ns.s)"),
        DOUBLE % ("'ab'", "'%s%s'|format(ns.s, ns.s)"),
        DOUBLE % ("'ab'", "'{0}{0}'.format(ns.s)"),
        DOUBLE % ("[1]", "[ns.s, ns.s]"),
        (DOUBLE % ("[1]", "[ns.s, ns.s]")).replace("{{ ns.s }}", "{{ ns.s|tojson }}"),
        (DOUBLE % ("[1]", "[ns.s, ns.s]")).replace("{{ ns.s }}", "{{ ns.s ~ '' }}"),
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 9999999999) }}",
        "{{ 'a'|center(9999999999) }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ 'a\\n'|indent(9999999999) }}",
        "{{ '\\t'.expandtabs(9999999999) }}",
        "{{ messages|tojson(indent=9999999999) }}",
        "{{ range(9999999999)|list }}",
        mark_slow(
            "{% macro m() %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endmacro %}{{ m()|length }}"
        ),
        mark_slow("{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}{{ x|length }}"),
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
)
def test_a_text_without_end_is_never_made(source: str) -> None:
    began = time.process_time()
    with pytest.raises((TemplateError, OverflowError)):
        render(source)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 2000])
def test_a_template_nested_too_deep_is_refused(source: str) -> None:
    with pytest.raises(ConfigurationError, match="nested too deep"):
        render(source + "{% endif %}" * source.count("{% if"))


def test_what_templates_do_is_left_alone() -> None:
    source = (
        "{%- macro turn(m) -%}<{{ m.role|title }}>{{ m['content'].strip() ~ eos_token }}{%- endmacro -%}"
        "{% for m in messages if m.content %}{{ loop.index0 }}/{{ loop.length }}{{ turn(m) }}"
        "{{ ', ' if not loop.last }}{% endfor %}{{ messages|tojson|length + 2 * 3 - 2 ** 3 }}"
        "{{ ['a', 'b']|join('-') + '%02d' % 7 + '{:>3}'.format(1) + ('=' * 3)|center(5) + 'a b'.replace(' ', '_') }}"
        "{{ messages[0].content[::-1] }}{{ 'x\ny'|indent(2) }}{{ messages|map(attribute='role')|list }}"
    )
    assert render(source) == (
        "0/2<User>Hello</s>, 1/2<Assistant>Yes</s>77a-b07  1 === a_bolleHx\n  y['user', 'assistant']"
    )
