"""What a text says is what is shown of it, whatever it says."""

from __future__ import annotations

import re
from html import unescape

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from training_lens.display.markdown import escape_markdown, markdown_table

TEXTS = [
    "plain, with 3.5 and a - b",
    "# head\n## two\n\n- item\n1. one\n    code\n===\n---",
    "<script>alert(1)</script> & &amp; <|user|> a<b>c",
    "| a | b |\n|---|---|\n*em* **strong** _x_ `code` ~~no~~ [a](http://b) ![c](d)",
    "1. begins\n> quote",
    "--- a",
    "  two  spaces   and\tmore ",
    "back\\slash \\* ```\nfence\n```",
    "\x02wzxhzdk:0\x03 \x00 \x7f",
    "Grüße 東京 🦉",
    "",
]


def shown(html: str) -> str:
    """What a browser shows of a paragraph."""
    inner = re.fullmatch(r"<p>(.*)</p>", html, re.S)
    assert inner, html
    text = re.sub(r"<br ?/?>", "\n", inner[1])
    assert "<" not in text
    return unescape(text).replace("\N{NO-BREAK SPACE}", " ").replace("\N{ZERO WIDTH SPACE}", "")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_shown_as_it_is(text: str) -> None:
    seen = text.expandtabs(4).translate({2: "␂", 3: "␃", 0: "␀", 0x7F: "␡"})
    assert shown(markdown_to_safe_html(escape_markdown(text))).rstrip(" ") == seen.rstrip(" ")


def test_a_table_holds_any_text() -> None:
    html = markdown_to_safe_html(markdown_table(["a", "b"], [[escape_markdown(text), "x"] for text in TEXTS]))
    assert html.count("<tr>") == len(TEXTS) + 1 and html.count("<td>x</td>") == len(TEXTS)


def test_numbers_in_cells_stay_as_they_are() -> None:
    assert [escape_markdown(text) for text in ("9.8532", "-5.17", "+4.5%", "token_f1")] == [
        "9.8532", "-5.17", "+4.5%", "token_f1",
    ]  # fmt: skip
    assert escape_markdown("1. x") == "&#49;. x"
