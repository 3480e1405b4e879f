"""A report as a value, written as HTML, Markdown or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.display.html import (
    BulletList,
    Callout,
    Part,
    Picture,
    PictureGrid,
    ShadedText,
    SvgPicture,
    Table,
    write_page,
)
from training_lens.display.markdown import escape_markdown, markdown_table
from training_lens.errors import ConfigurationError
from training_lens.utils.files import replace_non_finite, require_writable, write_json, write_text
from training_lens.utils.integrity import write_sealed


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
        require_known({"format": (format, tuple(WRITERS))})
        folder = Path(folder)
        require_writable(folder, "the reports' folder")
        name = "lens" if self.kind == "technical" else f"lens-{self.kind}"
        path = folder / f"{name}.{format}"
        WRITERS[format](path, self)
        return path

    def write_all(self, folder: Path | str, name: str, table: Table) -> None:
        """Write {name}.json, sealed, and {name}.md, .html and .csv, which holds the rows of `table`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(folder / f"{name}.json", replace_non_finite(dict(self.values)))
        lines = io.StringIO()
        csv.writer(lines).writerows([table.columns, *table.rows])
        for ending, text in ((".md", self.markdown()), (".csv", lines.getvalue())):
            write_text(folder / f"{name}{ending}", text)
        write_page(folder / f"{name}.html", self.title, self.parts)

    def markdown(self) -> str:
        """Text, tables and findings; figures as titles and captions."""
        return "\n\n".join([f"# {escape_markdown(self.title)}", *_render_parts(self.parts)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Kind, title and values; every number is finite or null."""
        return {"kind": self.kind, "title": self.title, **self.values}


WRITERS: Mapping[str, Callable[[Path, Report], None]] = {
    "html": lambda path, report: write_page(path, report.title, report.parts),
    "md": lambda path, report: write_text(path, report.markdown()),
    "json": lambda path, report: write_json(path, report.as_json()),
}


def require_known(allowed: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
    """Refuse values that are none of those allowed, all of them at once."""
    problems = [
        f"{key}: '{given}' is given; there are: {', '.join(known)}."
        for key, (given, known) in allowed.items()
        if given not in known
    ]
    if problems:
        raise ConfigurationError(problems)


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
        elif isinstance(part, ShadedText):
            text = escape_markdown("".join(token.visible_text for token in part.tokens))
            yield f"**{escape_markdown(part.caption)}**\n\n{text}"
        elif isinstance(part, Callout):
            facts = [f"> - {escape_markdown(name)}: {escape_markdown(value)}" for name, value in part.facts]
            yield "\n".join([f"> **{part.severity.capitalize()}: {escape_markdown(part.title)}**", ">", *facts])
        elif isinstance(part, SvgPicture):
            yield f"*Figure (in the HTML report).* {escape_markdown(part.caption)}"
        elif isinstance(part, Picture):
            yield f"*Figure (in the HTML report): {escape_markdown(part.title)}.* {escape_markdown(part.caption)}"
        elif isinstance(part, PictureGrid):
            yield from _render_parts(part.pictures)
