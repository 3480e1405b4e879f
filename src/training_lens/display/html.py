"""Self-contained HTML pages of text, tables and Plotly figures. They open offline, and all text is escaped.

They look as the dashboard's pages, fit screens from a phone's width up, and follow light and dark mode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from training_lens.utils.files import redact_for_file, write_text
from training_lens.utils.formatting import reveal_controls

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TEMPLATE = "page.html.jinja"
STRONGEST = 0.45  # opacity of the most shaded token
LONGEST_NUMBER = 24  # characters; a column with a longer cell is prose
NUMBER, NO_NUMBER = re.compile(r"[+-]?\.?\d"), ("", "-")
Severity = Literal["problem", "warning", "note", "fine"]


class ShortenedCell(str):
    """A cell of a table of which a page shows `short`, and the whole text on hover; elsewhere it is the whole text."""

    __slots__ = ("short",)
    short: str

    def __new__(cls, text: str, short: str) -> ShortenedCell:
        cell = super().__new__(cls, text)
        cell.short = short
        return cell


@dataclass(frozen=True)
class Table:
    """Rows of text under column names, with a caption. The first column and words align left, numbers right.

    On a phone a table with several columns of prose has a line for each cell, with its column's name.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def prose_columns(self) -> list[bool]:
        """Which columns are prose: those with a cell that is longer than any number."""
        return [
            any(len(getattr(row[i], "short", row[i])) > LONGEST_NUMBER for row in self.rows)
            for i in range(len(self.columns))
        ]

    def number_columns(self) -> list[bool]:
        """Which columns align right: those besides the first and prose whose cells begin as numbers, most of them."""
        prose = self.prose_columns()
        cells = [[row[i] for row in self.rows if row[i] not in NO_NUMBER] for i in range(len(self.columns))]
        return [
            i > 0 and not prose[i] and 2 * sum(map(bool, map(NUMBER.match, column))) >= len(column)
            for i, column in enumerate(cells)
        ]


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

    pictures: Sequence[Picture | SvgPicture]


@dataclass(frozen=True)
class ShadedToken:
    """A token's text, its number, and what a mouse over it shows; `is_marked` draws a frame around it."""

    text: str
    value: float
    title: str
    is_marked: bool = False

    @property
    def visible_text(self) -> str:
        """The text with a sign for each line end, and one for a token without a text."""
        return self.text.replace("\n", "\u23ce\n") or "\u00b7"


@dataclass(frozen=True)
class ShadedText:
    """Tokens in a row, shaded by their numbers: blue above 0, orange below, the largest the strongest."""

    caption: str
    tokens: Sequence[ShadedToken]

    def shades(self) -> list[tuple[ShadedToken, str]]:
        """Each token with its colour in CSS."""
        largest = max((abs(token.value) for token in self.tokens), default=0.0) or 1.0
        return [(token, _shade(token.value / largest)) for token in self.tokens]


def _shade(strength: float) -> str:
    """A colour in CSS that text stays readable on, for a strength from -1 to 1."""
    colour = "--accent" if strength > 0 else "--line-1"
    return f"color-mix(in srgb, var({colour}) {STRONGEST * abs(strength):.0%}, transparent)"


Part: TypeAlias = "str | Table | ShadedText | BulletList | Callout | SvgPicture | Picture | PictureGrid | Figure"


def write_page(path: Path, title: str, parts: Sequence[Part]) -> None:
    """Write one self-contained HTML file, atomically.

    Args:
        parts: in order. Text is escaped; it is a paragraph, or a heading if it starts with '# '. Plotly's script
            (4.8 MB) is inlined once if there is a figure.
    """
    template, script = _load_template(), ""
    if any(map(_needs_plotly, parts)):
        from plotly.offline import get_plotlyjs

        script = get_plotlyjs()
    body = redact_for_file(template.render_body(title, parts), path)  # not of the script
    style = read_static("parts.css") + read_static("style.css")
    text = template.render_page(redact_for_file(escape(title), path), body, style, script)
    write_text(path, text, verbatim=True)


def _needs_plotly(part: Part) -> bool:
    if isinstance(part, PictureGrid):
        return any(isinstance(picture, Picture) for picture in part.pictures)
    return not isinstance(part, str | Table | ShadedText | BulletList | Callout | SvgPicture)


def render_card(title: str, parts: Sequence[Part]) -> str:
    """HTML of a few kB for a notebook's cell, with scoped style and no script; `parts` without Plotly figures."""
    return str(_load_template().render_card(title, parts, read_static("parts.css")))


@cache
def read_static(name: str) -> str:
    """A packaged file of the pages: style, script or module."""
    return files("training_lens.display").joinpath("static", name).read_text(encoding="utf-8")


def _reveal(value: Any) -> Any:
    """A text of data without control characters; what is HTML already stays as it is."""
    return value if hasattr(value, "__html__") or not isinstance(value, str) else reveal_controls(value)


@cache
def _load_template() -> Any:
    """The macros of `page.html.jinja`, which escape what they are given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def plot(figure: Figure) -> str:
        options = {"displaylogo": False, "responsive": True, "showSendToCloud": False}  # its button uploads the data
        return str(figure.to_html(full_html=False, include_plotlyjs=False, validate=False, config=options))

    loader = PackageLoader("training_lens.display", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_reveal)
    environment.filters |= {"kind": lambda part: type(part).__name__, "plot": plot}
    return environment.get_template(TEMPLATE).module
