"""Files written whole or not at all: a temporary neighbour, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_lens.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp-"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and nothing otherwise.

    Where `path` is there by then (another process wrote the same), that one is kept; with `replace` it goes in the
    moment in which the new one comes, and not before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    outgoing = temporary.with_name(f"{temporary.name}-old")
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _fsync(file)
        _fsync(temporary)
        temporary.chmod(0o755)
        if replace and path.exists():
            path.rename(outgoing)
        try:
            temporary.rename(path)
        except OSError:
            if outgoing.is_dir():
                outgoing.rename(path)
                raise
            if not path.is_dir():
                raise
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(outgoing, ignore_errors=True)


def sweep_temporaries(folder: Path, older_than_seconds: float) -> None:
    """Delete what killed processes left half-written in `folder`; younger ones may be another's work in progress."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        if time.time() - leftover.stat().st_mtime < older_than_seconds:
            continue
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal, read in one pass of bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_in_folder(name: str, said: str) -> Path:
    """The path that `name` means, once a file can be there.

    Args:
        said: what the user gave, for the message.

    Raises:
        ConfigurationError: it is a folder, or in a folder that is not there.
    """
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
        raise ConfigurationError(f"{said}: {found}; give a file in a folder that is there.")
    return path


def require_writable(folder: Path, key: str) -> None:
    """Create `folder` and prove that files can be written in it.

    Raises:
        ConfigurationError: it cannot be created or written; names `key` as the setting to change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{key}: cannot write in '{folder}' ({error.strerror}). Give a folder that you may write."
        ) from error


def safe_save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, whole or not at all; they may live on any device."""
    from safetensors.torch import save_file

    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)
        _fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
