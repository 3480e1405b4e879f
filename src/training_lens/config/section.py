"""What the sections of the schema share: strictness, and types of their values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


def as_list(value: Any) -> Any:
    """One path where a list of paths is expected is a list of one; `Path` objects are their text."""
    values = [value] if isinstance(value, str | Path) else value
    return [str(v) if isinstance(v, Path) else v for v in values] if isinstance(values, list) else values


def folder_name(value: str) -> str:
    """`value`, where it is one component of a path."""
    if not value.strip() or value in (".", "..", "latest", "none") or set(value) & set("/\\\0"):
        raise ValueError(f"{value!r} cannot name a folder; use letters, digits, '-', '_' and '.'")
    return value


def expand_home(value: str) -> str:
    """`value` with the user's folder for a '~' at its start, unless a file of that very name is there."""
    return os.path.expanduser(value) if value.startswith("~") and not os.path.lexists(value) else value  # noqa: PTH111


PATH_MARKER = AfterValidator(expand_home)  # also tells that a key names files or folders

FolderName = Annotated[str, AfterValidator(folder_name)]
Place = Annotated[str, PATH_MARKER]
Paths = Annotated[list[Place], BeforeValidator(as_list)]
Names = Annotated[list[str], BeforeValidator(as_list)]
Rows = Annotated[list[Place] | list[dict[str, Any]], BeforeValidator(as_list)]


class Section(BaseModel):
    """A part of the config: strict about its keys, validated on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)
