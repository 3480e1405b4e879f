"""What the user of this machine has allowed for each run folder, recorded outside of these folders.

A run's config can name code: a model's own (model.trust_remote_code) or classes (tracking.custom). That code runs only
if the user allows it on the command line or in their own config file; a run folder alone cannot allow it. What they
allowed when they trained is recorded in XDG_STATE_HOME, else ~/.local/state: the run's absolute path and a hash of
each code file, and the settings that say where the run is sent (mirrors, trackers, hubs).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from filelock import FileLock

from training_lens.utils.files import hash_file, read_json, write_json
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def save_consent(folder: Path, allowed: Collection[str]) -> None:
    """Record what the user allows for `folder`; a failure is only a warning."""
    try:
        store, key = _consent_file(), str(folder.resolve())
        store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{store}.lock"):
            kept = _read_consents(store)
            if kept.get(key) != sorted(allowed):
                write_json(store, kept | {key: sorted(allowed)})
    except (OSError, RuntimeError) as error:
        logger.warning("what you allow for this run cannot be recorded (%s): allow it again when you resume", error)


def read_consent(folder: Path) -> frozenset[str]:
    """What the user allowed for `folder` before; empty if unknown."""
    try:
        return frozenset(_read_consents(_consent_file()).get(str(folder.resolve()), ()))
    except (OSError, RuntimeError):
        return frozenset()


def _consent_file() -> Path:
    """The file of consents. A relative XDG_STATE_HOME is ignored: it would depend on the working directory."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".local" / "state") / "training-lens" / "consent.json"


def _read_consents(store: Path) -> dict[str, list[str]]:
    try:
        kept = read_json(store)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s is no valid JSON (%s): what you allowed is forgotten", store, error)
        return {}
    return kept if isinstance(kept, dict) else {}


def find_model_code(folder: Path, own_id: str) -> set[str]:
    """The sha256 of a model's or tokenizer's Python files, and the repositories but `own_id` whose code it names."""
    found = {hash_file(path) for path in sorted(folder.rglob("*.py")) if path.is_file()}
    for path in sorted(folder.glob("*config.json")):
        try:
            named = set(_iterate_texts(read_json(path).get("auto_map")))
        except (ValueError, AttributeError):
            found.add(hash_file(path))
        else:
            found |= {name for name in named if "--" in name and name.partition("--")[0] != own_id}
    return found


def _iterate_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _iterate_texts(inner)


def find_file_code(path: Path) -> set[str]:
    """The path of a file or folder of code, and the sha256 of each file in it."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(path.absolute()), *(hash_file(file) for file in files if file.is_file())}


def find_module_code(place: str) -> set[str]:
    """`module.Class`, and the sha256 of its module's file or of all files of its package. Nothing is imported."""
    spec = PathFinder.find_spec(place.partition(".")[0], [str(Path.cwd()), *sys.path])
    if spec is None:
        return {place}
    files = [path for folder in spec.submodule_search_locations or () for path in Path(folder).rglob("*.py")]
    files += [Path(spec.origin)] if spec.origin else []
    return {place, *(hash_file(path) for path in files if path.is_file())}
