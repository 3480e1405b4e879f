"""Which names may become parts of a path: run ids, experiments, files below a folder.

A run id is ASCII, so that every file system, storage and tracker accepts it. An experiment's or sweep's name may have
spaces and letters of any script, because earlier versions allowed them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

from training_lens.errors import CheckpointError, ConfigurationError

RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
LONGEST, LONGEST_BYTES = 100, 200  # of a name, in characters and in UTF-8 bytes
LONGEST_PART = 255  # bytes between two '/', the limit of file systems
RESERVED = ("latest", "none")  # references to a run, and to no adapter


def check_run_id(name: str) -> str:
    """Return `name` if it is a valid run id.

    Raises:
        ConfigurationError: it has characters other than ASCII letters, digits, '.', '_' and '-', starts with '.' or
            '-', has over 100 characters, or is 'latest' or 'none'.
    """
    if not RUN_ID.fullmatch(name) or len(name) > LONGEST or name in RESERVED:
        raise ConfigurationError(
            f"{_quote_name(name)} cannot name a folder of a run; use at most {LONGEST} letters (a to z), digits, '.', "
            "'_' and '-', not '.' or '-' at the start, and neither 'latest' nor 'none'"
        )
    return name


def check_experiment(name: str) -> str:
    """Return `name` if it is valid for an experiment or a sweep.

    Raises:
        ConfigurationError: it is empty or too long, has '/', a backslash or an unprintable character, starts with
            '.', '-' or a space, ends with a space, or is 'latest' or 'none'.
    """
    is_too_long = len(name) > LONGEST or len(name.encode("utf-8", "surrogatepass")) > LONGEST_BYTES
    if not is_printable(name) or name[0] in ".-" or set(name) & set("/\\") or is_too_long or name in RESERVED:
        raise ConfigurationError(
            f"{_quote_name(name)} cannot name a folder of runs; use at most {LONGEST} letters, digits, '-', '_', '.' "
            "and spaces between them, not '.' or '-' at the start, and neither 'latest' nor 'none'"
        )
    return name


def is_printable(name: str) -> bool:
    """Whether a name prints unambiguously: no control or bidirectional characters, no space at either end."""
    return bool(name) and name.isprintable() and name == name.strip()


def find_name_fault(name: str) -> str:
    """Why `name`, with '/' between its parts, is not a safe relative path on every system; empty if it is."""
    parts = name.split("/")
    if not name.strip():
        return "it is empty"
    if "\\" in name or not name.isprintable():
        return "it holds a backslash or a sign that does not print"
    if name.startswith("/") or PureWindowsPath(name).drive:
        return "it is absolute"
    if ".." in parts:
        return "'..' leads out of a folder"
    if "" in parts or "." in parts:
        return "it has a part that is empty or '.'"
    return "it is too long" if max(len(part.encode()) for part in parts) > LONGEST_PART else ""


def check_file_name(name: str) -> str:
    """Return `name` if it is a safe relative path.

    Raises:
        ConfigurationError: see `find_name_fault`.
    """
    if fault := find_name_fault(name):
        raise ConfigurationError(f"{_quote_name(name)} names no file in the folder: {fault}")
    return name


def expand_home(path: str | Path) -> Path:
    """The path with a leading `~` or `~name` expanded, unless a file has that literal name or no such user exists."""
    text = str(path)
    if os.path.lexists(text) or "\0" in text:
        return Path(text)
    return Path(os.path.expanduser(text))  # noqa: PTH111  # pathlib's raises where nobody has the name


def require_contained(folder: Path, *, besides: tuple[str, ...] = ()) -> None:
    """Check that no symbolic link in a folder leads out of it, since writes would follow it.

    Args:
        besides: subfolders that are not checked, by relative name.

    Raises:
        CheckpointError: names the link and its target.
    """
    home = folder.resolve()
    for link in _find_links(folder, {folder / name for name in besides}):
        if not link.resolve().is_relative_to(home):
            raise CheckpointError(
                f"{link} is a symbolic link to {link.resolve()}, outside of {folder}. Nothing is read or written "
                "through it: put a copy in its place, or delete it."
            )


def _find_links(folder: Path, besides: set[Path]) -> list[Path]:
    found: list[Path] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink():
            found.append(path)
        elif path.is_dir() and path not in besides:
            found += _find_links(path, besides)
    return found


def _quote_name(name: str) -> str:
    return repr(name) if len(name) <= LONGEST else f"{name[:20]!r}... ({len(name)} characters)"
