"""Escapes any text for Markdown, and builds tables of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from training_lens.utils.formatting import reveal_controls

SYNTAX = re.compile(r"[&<>\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # `_` inside a word is no markup
BLOCK_START = re.compile(r"^(#|[-+](?=\s|[-+])|=|\d+(?=[.)](?:\s|$)))")


def escape_markdown(text: str) -> str:
    """`text` as one line of Markdown (and HTML) that renders literally.

    Line breaks become <br>, runs of spaces are kept, control characters become their Unicode pictures.

    Example:
        >>> escape_markdown("2 * 3 < 7" + chr(10) + "|x|")
        '2 &#42; 3 &#60; 7<br>&#124;x&#124;'
    """
    lines = reveal_controls(text).expandtabs(4).split("\n")
    escaped = [SYNTAX.sub(lambda found: f"&#{ord(found[0])};", line) for line in lines]
    # A number that would start a list keeps its digits but for the last.
    literal = [BLOCK_START.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", line) for line in escaped]
    return "<br>".join(re.sub(r"^ | (?= )", "&nbsp;", line) for line in literal) or "&#8203;"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Cells are one-line Markdown, as `escape_markdown` returns."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
