"""Lazy public names: a module is imported when its name is first used, so importing the package loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attach(
    names: Mapping[str, Sequence[str]], aliases: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for a package whose public names are defined in other modules.

    Args:
        names: module -> public names that it defines.
        aliases: another name -> one of those names.
    """
    home = {name: module for module, of_module in names.items() for name in of_module}
    targets = {name: name for name in home} | dict(aliases or {})

    def get_public_name(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"no public name {name!r}; there are: {', '.join(sorted(targets))}")
        target = targets[name]
        return getattr(import_module(home[target]), target)

    return get_public_name, lambda: sorted(targets), sorted(targets)
