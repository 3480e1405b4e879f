"""Public names that import their module when first used: importing the package costs nothing and pulls in no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attach(
    names: Mapping[str, Sequence[str]], aliases: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose public names live in other modules.

    Args:
        names: module -> the names it defines.
        aliases: another name -> one of those names.
    """
    home = {name: module for module, of_module in names.items() for name in of_module}
    targets = {name: name for name in home} | dict(aliases or {})

    def get(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"no public name {name!r}; there are: {', '.join(sorted(targets))}")
        target = targets[name]
        return getattr(import_module(home[target]), target)

    return get, lambda: sorted(targets), sorted(targets)
