"""A report as a value, and what it looks like as HTML, Markdown and JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training_lens.display.html import BulletList, Callout, Picture, PictureGrid, Table, write_page
from training_lens.errors import ConfigurationError
from training_lens.utils.files import require_writable, write_json, write_text

if TYPE_CHECKING:
    from training_lens.display.html import Part

ReportFormat = Literal["html", "md", "json"]
SPECIAL = re.compile(r"([\\`*\[\]<>|#])")


@dataclass(frozen=True)
class Report:
    """`parts` in their order, as a page has them; `values`, the same as numbers and texts for programs."""

    kind: str
    title: str
    parts: tuple[Part, ...]
    values: Mapping[str, Any]

    def write(self, folder: Path | str, format: str = "html") -> Path:
        """Write it into `folder`, which is made: the technical report as lens.html, others as lens-KIND.html.

        Args:
            format: html (one file that needs nothing else), md, or json.

        Raises:
            ConfigurationError: there is no such format, or the folder cannot be written.
        """
        if format not in WRITERS:
            raise ConfigurationError(f"format: '{format}' is given; there are: {', '.join(WRITERS)}.")
        folder = Path(folder)
        require_writable(folder, "the reports' folder")
        name = "lens" if self.kind == "technical" else f"lens-{self.kind}"
        path = folder / f"{name}.{format}"
        WRITERS[format](path, self)
        return path

    def html(self, path: Path | str) -> None:
        """Write it as a page (see `utils.pages`)."""
        write_page(Path(path), self.title, self.parts)

    def markdown(self) -> str:
        """Text, tables and findings; of pictures their titles and captions."""
        return "\n\n".join([f"# {escape(self.title)}", *_render_parts(self.parts)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Kind, title and values; every number is finite or null."""
        return {"kind": self.kind, "title": self.title, **self.values}


WRITERS: Mapping[str, Callable[[Path, Report], None]] = {
    "html": lambda path, report: report.html(path),
    "md": lambda path, report: write_text(path, report.markdown()),
    "json": lambda path, report: write_json(path, report.as_json()),
}


def escape(words: str) -> str:
    """Words of data in Markdown: their markup stays text."""
    return SPECIAL.sub(r"\\\1", words)


def _render_parts(parts: Iterable[Part]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, str):
            yield f"## {escape(part[2:])}" if part.startswith("# ") else escape(part)
        elif isinstance(part, BulletList):
            yield "\n".join(f"- {escape(item)}" for item in part.items)
        elif isinstance(part, Table):
            yield _render_table(part)
        elif isinstance(part, Callout):
            facts = [f"> - {escape(name)}: {_render_line(value)}" for name, value in part.facts]
            yield "\n".join([f"> **{part.severity.capitalize()}: {_render_line(part.title)}**", ">", *facts])
        elif isinstance(part, Picture):
            yield f"*Picture (in the HTML report): {escape(part.title)}.* {escape(part.caption)}"
        elif isinstance(part, PictureGrid):
            yield from _render_parts(part.pictures)


def _render_line(words: str) -> str:
    return escape(" ".join(words.split()))


def _render_table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    cells = [[cell if i == 1 else _render_line(cell) for cell in line] for i, line in enumerate(lines)]
    return "\n".join([f"**{_render_line(table.caption)}**", "", *(f"| {' | '.join(line)} |" for line in cells)])
