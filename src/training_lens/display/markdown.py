"""Escapes any text for Markdown, and builds tables of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

SYNTAX = re.compile(r"[&<>\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # `_` inside a word is no markup
BLOCK_START = re.compile(r"^(#|[-+](?=\s|[-+])|=|\d+(?=[.)](?:\s|$)))")
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def escape_markdown(text: str) -> str:
    """`text` as one line of Markdown (and HTML) that renders literally.

    Line breaks become <br>, runs of spaces are kept, control characters become their Unicode pictures.

    Example:
        >>> escape_markdown("2 * 3 < 7" + chr(10) + "|x|")
        '2 &#42; 3 &#60; 7<br>&#124;x&#124;'
    """
    lines = text.replace("\r\n", "\n").translate(CONTROL).expandtabs(4).split("\n")
    return "<br>".join(_escape_line(line) for line in lines) or "&#8203;"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Cells are one-line Markdown, as `escape_markdown` returns."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape_line(line: str) -> str:
    escaped = SYNTAX.sub(lambda found: f"&#{ord(found[0])};", line)
    return re.sub(r"^ | (?= )", "&nbsp;", BLOCK_START.sub(_entity_at_end, escaped))


def _entity_at_end(found: re.Match[str]) -> str:
    """The match with its last character as an entity, so that a number keeps its digits."""
    return f"{found[0][:-1]}&#{ord(found[0][-1])};"
