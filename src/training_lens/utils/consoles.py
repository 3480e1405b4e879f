"""Rich consoles that print text literally: brackets in a path or row are not markup, `:x:` is not an emoji."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A Rich console without markup in texts, tables and titles; without a terminal it folds no line.

    Pass styles as arguments or `Text`.

    Args:
        options: as for Rich's `Console`.
    """
    console = Console(**{"highlight": False, "emoji": False, "markup": False, **options})
    console.soft_wrap = not console.is_terminal
    return console
