"""Atomic files and folders: a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from training_lens.errors import ConfigurationError, OutputError
from training_lens.utils.limits import RECORD_BYTES, load_bounded_json, open_file, read_bytes
from training_lens.utils.logging import get_logger
from training_lens.utils.names import expand_home
from training_lens.utils.secrets import STRUCK, redact_text, redact_values

TEMPORARY = ".tmp-"
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
THIS_START = secrets.token_hex(3)  # of this process, since process ids are reused
OWNED = re.compile(re.escape(TEMPORARY) + r"(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>[0-9a-f]{6})-.*")
logger = get_logger(__name__)


def _fsync(path: Path) -> None:
    """Write a file or folder to the disk. Windows opens no folder, and writes names by itself."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, verbatim: bool = False) -> None:
    """Write `text` to `path` atomically; `verbatim` keeps secrets, for rows, tokenizers and models."""
    descriptor, name = tempfile.mkstemp(prefix=temporary_prefix(path.parent), dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text if verbatim else redact_for_file(text, path))
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_json(path: Path, value: Any, *, verbatim: bool = False) -> None:
    """Write `value` as indented JSON, atomically; `verbatim` as for `write_text`. See `replace_non_finite`."""
    value = replace_non_finite(value if verbatim else redact_values_for_file(value, path))
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", verbatim=True)


def replace_non_finite(value: Any) -> Any:
    """The value with null for each number that is not finite: JSON has no such numbers, and strict readers fail."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return json.loads(json.dumps(value), parse_constant=lambda _name: None)
    return value


def redact_for_file(text: str, path: Path) -> str:
    """`text` without secrets, to be written to `path`. The first redaction of a run is logged."""
    clean = redact_text(text)
    if clean != text:
        _warn_of_redaction(path.parent.parent)
    return clean


def redact_values_for_file(value: Any, path: Path) -> Any:
    """As `redact_for_file`, for all strings in a JSON value."""
    text = json.dumps(value)
    if redact_text(text) == text or (clean := redact_values(value)) == value:
        return value
    _warn_of_redaction(path.parent.parent)
    return clean


@lru_cache(maxsize=1024)
def _warn_of_redaction(folder: Path) -> None:
    logger.warning(
        "what looks like a secret (a token, key or password) was replaced in files in %s by %s. "
        "The rows that are trained on are unchanged: look for it in your data.",
        folder, STRUCK,
    )  # fmt: skip


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read, is no regular file, or is over `RECORD_BYTES`.
        ValueError: it is not JSON, or an object has the same key twice.
    """
    return parse_json(read_bytes(path, RECORD_BYTES).decode("utf-8"))


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises as `read_json`."""

    def require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return values

    return load_bounded_json(text, object_pairs_hook=require_unique)


class DuplicateKeyError(ValueError):
    """A JSON object has the same key twice; its argument is the key."""

    def __str__(self) -> str:
        return f"the key '{self.args[0]}' stands twice in one place; keep one"


@contextmanager
def atomic_folder(path: Path, *, existing: Literal["keep", "refuse", "replace"] = "keep") -> Iterator[Path]:
    """A temporary folder that is renamed to `path` when the block succeeds, and deleted otherwise.

    Args:
        path: a new or empty folder; a link is followed.
        existing: what to do if `path` has files at the end of the block: `keep` them and drop the new ones (for content
            that is the same whoever writes it), `refuse` with an error, or `replace` them.

    Raises:
        OutputError: with `refuse`, if another process filled `path` meanwhile.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(path.parent), dir=path.parent))
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _fsync(file)
        _fsync(temporary)
        temporary.chmod(0o755)
        try:
            _swap_folders(temporary, path) if existing == "replace" and path.is_dir() else temporary.rename(path)
        except OSError as error:
            if existing == "refuse" and path.exists():
                raise OutputError(
                    f"{path}: another process wrote there meanwhile. Its files are kept and this result was dropped; "
                    "give another folder, or look at what is there."
                ) from error
            if existing != "keep" or not path.is_dir():
                raise
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_folders(new: Path, path: Path) -> None:
    """Replace the folder `path` by `new`. Between the two renames the old one has a temporary name."""
    aside = Path(tempfile.mkdtemp(prefix=temporary_prefix(path.parent), dir=path.parent))
    try:
        path.rename(aside)  # onto an empty folder: one step
        try:
            new.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        with suppress(OSError):  # already gone, or it holds the old folder because the swap failed
            aside.rmdir()


def temporary_prefix(folder: Path) -> str:
    """The prefix of temporary names in `folder`. Leftovers of dead processes are deleted first."""
    sweep_temporaries(folder)
    return f"{TEMPORARY}{HOST}-{os.getpid()}-{THIS_START}-"


def sweep_temporaries(folder: Path, older_than_seconds: float = math.inf, prefix: str = TEMPORARY) -> None:
    """Delete unfinished files of dead processes in `folder`; those of other or unknown machines by their age."""
    for leftover in folder.glob(f"{prefix}*"):
        with suppress(FileNotFoundError):  # another process sweeps, too
            if _is_abandoned(leftover, older_than_seconds):
                is_folder = leftover.is_dir() and not leftover.is_symlink()
                shutil.rmtree(leftover, ignore_errors=True) if is_folder else leftover.unlink()


def _is_abandoned(leftover: Path, older_than_seconds: float) -> bool:
    owner = OWNED.fullmatch(leftover.name)
    if owner is None or owner["host"] != HOST:
        return time.time() - leftover.lstat().st_mtime >= older_than_seconds
    pid = int(owner["pid"])
    return owner["start"] != THIS_START if pid == os.getpid() else not _is_running(pid)


def _is_running(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def list_files(folder: Path) -> list[Path]:
    """All files below a folder; empty if it does not exist."""
    found = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return [path for path in found if path.is_file()]


def hash_bytes(content: bytes) -> int:
    """A hash of 64 bits (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def hash_file(path: Path) -> str:
    """The sha256 of a file in hexadecimal. Reads it once, in bounded memory."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_file_path(name: str, setting: str) -> Path:
    """The path `name`, checked to be one where a file can be written.

    Args:
        setting: the option and its value, for the message.

    Raises:
        ConfigurationError: it is a folder, or its folder does not exist.
    """
    path = expand_home(name)
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
        raise ConfigurationError(f"{setting}: {found}; give a file in an existing folder.")
    return path


def require_writable(folder: Path, key: str) -> None:
    """Create `folder` and check that files can be written in it.

    Raises:
        ConfigurationError: it cannot be created or written; names the setting `key`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigurationError(
            f"{key}: cannot write in '{folder}' ({error.strerror}). Give a folder that you may write."
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block succeeds, and deleted otherwise."""
    temporary = path.with_name(f"{temporary_prefix(path.parent)}{path.name}")
    temporary.unlink(missing_ok=True)  # a planted link would redirect what is written
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
