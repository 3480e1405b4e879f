"""Self-contained HTML pages of text, tables and Plotly figures: they open offline, and text of data stays text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from training_lens.utils.files import write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { border-bottom: 1px solid #d8dee4; padding: .3rem .8rem; text-align: right; white-space: pre-wrap }
th:first-child, td:first-child { text-align: left }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under column names, with a caption; the first column is aligned left, numbers right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(path: Path, title: str, parts: Sequence[str | Table | Figure]) -> None:
    """Write one HTML file that needs nothing else, whole or not at all.

    Args:
        parts: in their order: a text is a paragraph (a heading where it begins with '# '), escaped; a table; a figure.
            Plotly's script (4.5 MB) is inlined once where there is a figure.
    """
    script = ""
    if any(not isinstance(part, str | Table) for part in parts):
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    body = "\n".join(_html(part) for part in parts)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>{script}</head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n",
    )


def _html(part: str | Table | Figure) -> str:
    if isinstance(part, str):
        heading = part.startswith("# ")
        return f"<h2>{escape(part[2:])}</h2>" if heading else f"<p>{escape(part)}</p>"
    if isinstance(part, Table):
        head = "".join(f"<th>{escape(name)}</th>" for name in part.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in part.rows)
        return f"<table><caption>{escape(part.caption)}</caption><tr>{head}</tr>\n{rows}</table>"
    return str(part.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))
