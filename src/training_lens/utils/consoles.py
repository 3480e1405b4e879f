"""Rich consoles that print text literally: brackets in a path or row are not markup, `:x:` is not an emoji."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A Rich console without markup in texts, tables and titles. Pass styles as arguments or `Text`.

    Args:
        options: as for Rich's `Console`.
    """
    return Console(**{"highlight": False, "emoji": False, "markup": False, **options})
