"""Hashes of files: recorded by the writer, checked by the reader.

A JSON object contains its own hash (`write_sealed`), and so does each line of a journal (`seal_line`) and a binary file
whose format allows metadata (`seal_file`). The sha256 of other files is in a run's metadata/hashes.json
(`record_hashes`) or a checkpoint's manifest. Files of earlier versions have no hash and are read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_lens.errors import DamagedFileError
from training_lens.utils.file_schemas import find_type_error
from training_lens.utils.files import (
    atomic_file,
    hash_file,
    read_json,
    redact_values_for_file,
    replace_non_finite,
    write_json,
)
from training_lens.utils.limits import open_file
from training_lens.utils.names import find_name_fault

if TYPE_CHECKING:
    import torch

CHECKSUM = "checksum"  # key in a JSON object: the sha256 of its other values
LINE_CHECKSUM = "crc"  # key in a journal line, with the CRC-32 of its other values
RECORDS = ("metadata/hashes.json", "manifest.json")  # of a run and of a checkpoint: the sha256 of files under `files`
SEAL = b"training-lens-sha256:"  # in a binary file, before its sha256, which is computed with zeros in its own place
LINE_ENDING = len(f', "{LINE_CHECKSUM}": "01234567"}}')
SHA256 = re.compile(rb"[0-9a-f]{64}")
UNSEALED = SEAL.decode() + 64 * "0"


def write_sealed(path: Path, values: Mapping[str, Any], *, verbatim: bool = False) -> None:
    """Write a JSON object with its own hash, atomically; `verbatim` as for `write_text`."""
    clean = values if verbatim else redact_values_for_file(dict(values), path)
    write_json(path, with_checksum(clean), verbatim=True)


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its hash, as `write_sealed` writes it."""
    return {**values, CHECKSUM: _hash_values(values)}


def read_sealed(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object that `write_sealed` wrote, without its hash.

    Args:
        required: refuse a file without a hash, because every version wrote one.

    Raises:
        DamagedFileError: it is not what was written.
        FileNotFoundError: there is no such file.
    """
    try:
        values = read_json(path)
    except ValueError as error:
        raise DamagedFileError(f"{path} is no valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path} holds a {type(values).__name__}, expected keys and values.")
    return strip_checksum(values, path, required=required)


def strip_checksum(values: dict[str, Any], path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object read from `path`, checked, without its hash; arguments and errors as for `read_sealed`."""
    content = {key: value for key, value in values.items() if key != CHECKSUM}
    is_sealed = required or CHECKSUM in values or _has_damaged_key(values, _hash_values)
    if is_sealed and values.get(CHECKSUM) != _hash_values(content):
        raise DamagedFileError(f"{path} is damaged: its content does not match its checksum.")
    if misfit := find_type_error(path.name, content):
        raise DamagedFileError(f"{path} has a wrong value. {misfit}. Restore it, or write it again.")
    return content


def _has_damaged_key(values: Mapping[str, Any], checksum: Callable[[Mapping[str, Any]], str]) -> bool:
    """Whether the last value is the checksum of the others, under a damaged key."""
    *others, last = values or [""]
    return last in values and values[last] == checksum({key: values[key] for key in others})


def _hash_values(values: Mapping[str, Any]) -> str:
    # as read back: tuples become lists, keys become strings, numbers that are not finite become null
    plain = json.loads(json.dumps(replace_non_finite(values)))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def seal_line(values: Mapping[str, Any]) -> str:
    """The values as a line of JSON with its own checksum."""
    return json.dumps({**values, LINE_CHECKSUM: _checksum_of_line(values)})


def read_line(line: str | bytes) -> dict[str, Any] | None:
    """The values of a line of JSON, without the checksum; None if it is cut short or damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    if LINE_CHECKSUM not in values:  # of an earlier version
        return None if _has_damaged_key(values, _checksum_of_line) else values
    checksum = values.pop(LINE_CHECKSUM)
    return values if checksum == _checksum_of_text(line) or checksum == _checksum_of_line(values) else None


def has_valid_seal(line: bytes) -> bool:
    """Whether a line without its line end is to the byte what `seal_line` wrote, without parsing it."""
    return line.endswith(b', "crc": "%08x"}' % zlib.crc32(b"}", zlib.crc32(line[:-LINE_ENDING])))


def _checksum_of_text(line: str | bytes) -> str:
    """What `seal_line` computed for this line, from its text: half the time of writing its values again."""
    text = (line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line).rstrip()
    return f"{zlib.crc32(b'}', zlib.crc32(text[:-LINE_ENDING])):08x}"


def _checksum_of_line(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values).encode()):08x}"


def safe_save(tensors: Mapping[str, torch.Tensor], path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write tensors (on any device) as one safetensors file with its own hash, atomically."""
    from safetensors.torch import save_file

    with atomic_file(Path(path)) as temporary:
        plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
        save_file(plain, temporary, {**(metadata or {}), "sha256": UNSEALED})
        seal_file(temporary)


def seal_file(path: Path) -> None:
    """Replace `UNSEALED` in a file's metadata by the file's sha256."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        place = content.find(UNSEALED.encode()) + len(SEAL)
        content[place : place + 64] = _hash_around(content, place).encode()


def verify_seal(path: Path) -> None:
    """Compare a file with the sha256 in it. A file of an earlier version, without one, passes.

    Cost: the file is read once, and again only after it changed.

    Raises:
        DamagedFileError: it is not what was written.
        OSError: it cannot be read.
    """
    if not _holds_seal(path, *_file_identity(path)):
        raise DamagedFileError("its content does not match the sha256 in it")


@lru_cache(maxsize=4096)
def _holds_seal(path: Path, *_file_identity: int) -> bool:
    with open_file(path) as file:
        if not os.fstat(file.fileno()).st_size:
            return True  # whoever opens it will report that
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = content.find(SEAL) + len(SEAL)
            if place < len(SEAL):
                return not any(_holds_part(content, part) for part in ((SEAL[:10], 0), (SEAL[10:], 10)))
            return content[place : place + 64] == _hash_around(content, place).encode()


def _holds_part(content: mmap.mmap, part: tuple[bytes, int]) -> bool:
    """Whether a part of `SEAL` (text, offset) is followed by a sha256 at its place, so that the rest was damaged."""
    text, offset = part
    starts = (found.start() - offset + len(SEAL) for found in re.finditer(re.escape(text), content))
    return any(SHA256.fullmatch(content[start : start + 64]) for start in starts)


def _hash_around(content: mmap.mmap, place: int) -> str:
    with memoryview(content) as view:
        digest = hashlib.sha256(view[:place])
        digest.update(64 * b"0")
        digest.update(view[place + 64 :])
    return digest.hexdigest()


def record_hashes(root: Path, files: Iterable[Path]) -> None:
    """Record the current hashes of files of the run in `root`."""
    record = root / RECORDS[0]
    known = read_sealed(record)["files"] if record.is_file() else {}
    now = {path.relative_to(root).as_posix(): hash_file(path) for path in files}
    write_sealed(record, {"files": dict(sorted({**known, **now}.items()))})


def read_recorded_hashes(root: Path) -> dict[str, str]:
    """The recorded sha256 of each file of a run or checkpoint, by relative name; empty for an older run.

    Raises:
        DamagedFileError: the record itself is damaged.
    """
    for record in RECORDS:
        if (root / record).is_file():
            files: dict[str, str] = read_sealed(root / record).get("files", {})
            if bad := [name for name in files if find_name_fault(name)]:
                raise DamagedFileError(f"{root / record} names {bad[0]!r}: {find_name_fault(bad[0])}.")
            return files
    return {}


def require_intact(path: Path) -> None:
    """Compare a file, or all recorded files of a folder, with the hashes recorded in its run or checkpoint.

    Cost: each file is read once, and again only after it changed.

    Raises:
        DamagedFileError: names the first file that is missing or differs.
    """
    for root in list(path.absolute().parents)[:3]:
        name = path.absolute().relative_to(root).as_posix()
        if damaged := next(find_damaged_files(root, name), None):
            raise DamagedFileError(
                f"{damaged}: it was damaged, or changed since. training-lens doctor {root} says what can be repaired, "
                "and how to take it as it is."
            )


def find_damaged_files(root: Path, within: str = "") -> Iterator[str]:
    """Problems of recorded files of a run or checkpoint, or only of `within`: 'PATH is missing', 'PATH differs ...'."""
    for name, sha256 in read_recorded_hashes(root).items():
        if not within or name == within or name.startswith(f"{within}/"):
            path = root / name
            if not path.is_file():
                yield f"{path} is missing"
            elif _sha256_of(path, *_file_identity(path)) != sha256:
                yield f"{path} differs from the sha256 that was recorded"


def _file_identity(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, *_file_identity: int) -> str:
    return hash_file(path)
