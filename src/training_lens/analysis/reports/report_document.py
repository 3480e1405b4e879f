"""A report as a value, written as HTML, Markdown or JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training_lens.display.html import BulletList, Callout, Picture, PictureGrid, Table, write_page
from training_lens.display.markdown import escape_markdown, markdown_table
from training_lens.errors import ConfigurationError
from training_lens.utils.files import require_writable, write_json, write_text

if TYPE_CHECKING:
    from training_lens.display.html import Part

ReportFormat = Literal["html", "md", "json"]


@dataclass(frozen=True)
class Report:
    """`parts` are the sections of the page in order; `values` holds the same content for programs."""

    kind: str
    title: str
    parts: tuple[Part, ...]
    values: Mapping[str, Any]

    def write(self, folder: Path | str, format: str = "html") -> Path:
        """Write it into `folder`, which is created: the technical report as lens.html, others as lens-KIND.html.

        Args:
            format: html (one self-contained file), md, or json.

        Raises:
            ConfigurationError: the format is unknown, or the folder is not writable.
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
        """Write it as one page (see `display.html.write_page`)."""
        write_page(Path(path), self.title, self.parts)

    def markdown(self) -> str:
        """Text, tables and findings; figures as titles and captions."""
        return "\n\n".join([f"# {escape_markdown(self.title)}", *_render_parts(self.parts)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Kind, title and values; every number is finite or null."""
        return {"kind": self.kind, "title": self.title, **self.values}


WRITERS: Mapping[str, Callable[[Path, Report], None]] = {
    "html": lambda path, report: report.html(path),
    "md": lambda path, report: write_text(path, report.markdown()),
    "json": lambda path, report: write_json(path, report.as_json()),
}


def _render_parts(parts: Iterable[Part]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, str):
            heading = part.startswith("# ")
            yield f"## {escape_markdown(part[2:])}" if heading else escape_markdown(part)
        elif isinstance(part, BulletList):
            yield "\n".join(f"- {escape_markdown(item)}" for item in part.items)
        elif isinstance(part, Table):
            columns, *rows = ([escape_markdown(cell) for cell in row] for row in (part.columns, *part.rows))
            yield f"**{escape_markdown(part.caption)}**\n\n{markdown_table(columns, rows)}"
        elif isinstance(part, Callout):
            facts = [f"> - {escape_markdown(name)}: {escape_markdown(value)}" for name, value in part.facts]
            yield "\n".join([f"> **{part.severity.capitalize()}: {escape_markdown(part.title)}**", ">", *facts])
        elif isinstance(part, Picture):
            yield f"*Figure (in the HTML report): {escape_markdown(part.title)}.* {escape_markdown(part.caption)}"
        elif isinstance(part, PictureGrid):
            yield from _render_parts(part.pictures)
