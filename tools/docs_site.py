"""What `make docs` adds to the pages of docs/: an API reference from the docstrings, and CONTRIBUTING.md as a page.

mkdocs.yml loads this file twice: as a hook of mkdocs, and as an extension of griffe, which reads the docstrings.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe  # type: ignore[import-not-found]
from mkdocs.structure.files import File, Files  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "training_lens"
RANK_LOWER = "---\nsearch: {boost: 0.2}\n---\n"  # guides come first in the search
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
OUTSIDE_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+(?:benchmarks|examples|src|tools|tests)/[^)]*)\)")
EXAMPLE = re.compile(r"^( *)Example:\n((?:\1 +.*\n?|\n)+)", re.MULTILINE)


def on_config(config: Any) -> Any:
    """List the API pages in the navigation."""
    for entry in config["nav"]:
        if "API" in entry:
            entry["API"] = [{page.removeprefix("training_lens."): f"api/{page}.md"} for page in list_pages()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for page, modules in list_pages().items():
        blocks = "\n\n".join(f"::: {module}" for module in modules)
        blocks = blocks.replace(f"::: {page}\n", f"::: {page}\n    options: {{show_root_heading: false}}\n", 1)
        files.append(File.generated(config, f"api/{page}.md", content=f"{RANK_LOWER}# {page}\n\n{blocks}\n"))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files outside of docs/ in place of links to them, and keep brackets that are no references."""
    named = OUTSIDE_LINK.sub(lambda m: f"{m[1]} (`{m[2].replace('../', '')}`)", markdown)
    return escape_brackets(named)


def escape_brackets(markdown: str) -> str:
    """Markdown in which `[a][b]` outside of code is text, and no reference."""
    parts = CODE.split(markdown)
    return "".join(part if i % 2 else re.sub(r"\]( ?)\[", r"]\1\\[", part) for i, part in enumerate(parts))


def list_pages() -> dict[str, list[str]]:
    """The modules of each page: a page for `errors`, and one for each package."""
    pages = {"training_lens.errors": ["training_lens.errors"]}
    for path in sorted(PACKAGE.rglob("*.py")):
        package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        if package != "training_lens":
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            pages.setdefault(package, []).append(name)
    return pages


class DocstringForm(griffe.Extension):  # type: ignore[misc]
    """Shows the code under `Example:` as code, and brackets as they are."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            value = EXAMPLE.sub(lambda m: f"{m[1]}**Example**\n\n{fence(m[2])}\n", obj.docstring.value)
            obj.docstring.value = escape_brackets(value)


def fence(code: str) -> str:
    """Code as a fenced block, without indentation."""
    return f"```python\n{textwrap.dedent(code).strip()}\n```\n"
