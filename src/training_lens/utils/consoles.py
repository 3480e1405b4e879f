"""What people read on a screen: every text as it is. Brackets in a path or a row are no markup, `:x:` is no emoji."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """Rich's console, which takes styles by argument or as `Text`, and no markup out of texts, tables and titles.

    Args:
        options: as of rich's `Console`.
    """
    return Console(**{"highlight": False, "emoji": False, "markup": False, **options})
