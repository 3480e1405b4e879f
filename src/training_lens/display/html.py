"""Self-contained HTML pages of text, tables and Plotly figures. They open offline, and all text is escaped.

They fit screens from a phone's width up, and follow light and dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from training_lens.utils.files import redact_for_file, write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAGE_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #57606a; --line: #d8dee4; --box: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --page: #0d1117; --soft: #9198a1; --line: #30363d; --box: #161b22 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); overflow-wrap: anywhere }
@media (max-width: 600px) { body { margin: 1rem auto; padding: 0 .7rem } }
"""
CARD = "training-lens"  # the CSS class of a card, which scopes its style
CARD_STYLE = """
  --soft: #7d8590; --line: rgba(128, 128, 128, .35); --box: rgba(128, 128, 128, .08);
  max-width: 60rem; line-height: 1.5;
"""  # colors for light and dark notebooks, whose theme need not be the system's
PARTS_STYLE = """
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin: 0 0 .3rem }
.scroll { overflow-x: auto; margin: 0 0 1rem }
table { border-collapse: collapse } .caption { font-weight: 600; margin: 1.2rem 0 .3rem }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; white-space: pre-wrap;
  overflow-wrap: normal; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, .words { text-align: left }
td.words:not(:first-child) { overflow-wrap: anywhere; min-width: 11rem } td:first-child { min-width: 8rem }
figure { margin: 1.5rem 0; min-width: 0 } figcaption { color: var(--soft); font-size: .9rem }
.beside { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0 1.5rem }
.callout { border: 1px solid var(--line); border-left: .35rem solid var(--mark); background: var(--box);
  padding: .7rem 1rem; margin: 1rem 0; border-radius: .3rem }
.callout p { margin: .3rem 0 }
.problem { --mark: #cf222e } .warning { --mark: #bf8700 } .note { --mark: #0969da } .fine { --mark: #1a7f37 }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .15rem 1rem; margin: .5rem 0 0 }
dt { color: var(--soft) } dd { margin: 0; white-space: pre-wrap }
@media (max-width: 600px) {
  th, td { padding: .3rem .4rem } dl { grid-template-columns: 1fr }
  dd { margin: 0 0 .4rem } }
"""
LONGEST_NUMBER = 24  # characters; a column with a longer cell is prose
Severity = Literal["problem", "warning", "note", "fine"]


@dataclass(frozen=True)
class Table:
    """Rows of text under column names, with a caption. The first column and prose align left, numbers right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class BulletList:
    """A bulleted list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Callout:
    """A highlighted box: its severity as word and color, a title, and facts as (name, text)."""

    severity: Severity
    title: str
    facts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class SvgPicture:
    """An SVG of ours, inserted without escaping, with a caption that says how to read it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """A Plotly figure with a title and a caption that says how to read it."""

    title: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class PictureGrid:
    """Pictures side by side, or one below the other on narrow pages."""

    pictures: Sequence[Picture]


if TYPE_CHECKING:
    Part: TypeAlias = str | Table | BulletList | Callout | SvgPicture | Picture | PictureGrid | Figure


def write_page(path: Path, title: str, parts: Sequence[Part]) -> None:
    """Write one self-contained HTML file, atomically.

    Args:
        parts: in order. Text is escaped; it is a paragraph, or a heading if it starts with '# '. Plotly's script
            (4.8 MB) is inlined once if there is a figure.
    """
    script = ""
    if any(not isinstance(part, str | Table | BulletList | Callout | SvgPicture) for part in parts):
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    body = redact_for_file(f"<h1>{escape(title)}</h1>\n{_render_parts(parts)}\n", path)  # not of the script
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{redact_for_file(escape(title), path)}</title><style>{PAGE_STYLE}{PARTS_STYLE}</style>"
        f"{script}</head>\n"
        f"<body>{body}</body></html>\n",
        verbatim=True,
    )


def render_card(title: str, parts: Sequence[Part]) -> str:
    """HTML of a few kB for a notebook's cell, with scoped style and no script.

    Args:
        parts: as for `write_page`, without Plotly figures.
    """
    style = f".{CARD} {{{CARD_STYLE}{PARTS_STYLE}}}"
    return f'<div class="{CARD}"><style>{style}</style><h3>{escape(title)}</h3>\n{_render_parts(parts)}</div>'


def _render_parts(parts: Iterable[Part]) -> str:
    return "\n".join(_render_part(part) for part in parts)


def _render_part(part: Part) -> str:
    if isinstance(part, str):
        heading = part.startswith("# ")
        return f"<h2>{escape(part[2:])}</h2>" if heading else f"<p>{escape(part)}</p>"
    if isinstance(part, BulletList):
        return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in part.items)}</ul>"
    if isinstance(part, Table):
        return _render_table(part)
    if isinstance(part, Callout):
        return _render_callout(part)
    if isinstance(part, SvgPicture):
        return f"<figure>{part.svg}<figcaption>{escape(part.caption)}</figcaption></figure>"
    if isinstance(part, PictureGrid):
        return f'<div class="beside">{_render_parts(part.pictures)}</div>'
    if isinstance(part, Picture):
        title, caption = escape(part.title), escape(part.caption)
        return f"<figure><h3>{title}</h3>{_render_figure(part.figure)}<figcaption>{caption}</figcaption></figure>"
    return _render_figure(part)


def _render_table(table: Table) -> str:
    prose = [any(len(row[i]) > LONGEST_NUMBER for row in table.rows) for i in range(len(table.columns))]
    head, *rows = (
        _render_table_row(tag, cells, prose) for tag, cells in (("th", table.columns), *(("td", r) for r in table.rows))
    )
    caption = escape(table.caption)  # above the scrolling part, so that a phone shows all of it
    return f'<p class="caption">{caption}</p>\n<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _render_table_row(tag: str, cells: Sequence[str], prose: Sequence[bool]) -> str:
    starts = (f'<{tag} class="words">' if words else f"<{tag}>" for words in prose)
    return f"<tr>{''.join(f'{start}{escape(cell)}</{tag}>' for start, cell in zip(starts, cells, strict=True))}</tr>\n"


def _render_callout(box: Callout) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in box.facts)
    definitions = f"<dl>{facts}</dl>" if facts else ""
    title = f"{box.severity.capitalize()}: {escape(box.title)}"
    return f'<section class="callout {box.severity}"><h3>{title}</h3>{definitions}</section>'


def _render_figure(figure: Figure) -> str:
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False}  # its button would upload the data
    return str(figure.to_html(full_html=False, include_plotlyjs=False, validate=False, config=config))
