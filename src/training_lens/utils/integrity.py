"""Hashes of files: recorded by whoever writes them, compared by whoever reads them.

Three ways, by what a file allows: a JSON object holds its own (`write_sealed`); a binary file whose format has room for
metadata holds its own, too (`seal`); of all others a run keeps the sha256 in metadata/hashes.json (`record_hashes`).
Files of earlier versions have none, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_lens.errors import DamagedFileError
from training_lens.utils.files import read_json, write_json

CHECKSUM = "checksum"  # the key of a JSON object that holds the sha256 of all else in it


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object that holds its own hash, whole or not at all."""
    write_json(path, {**values, CHECKSUM: _hash_values(values)})


def read_sealed(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object that `write_sealed` wrote, without its hash.

    Args:
        required: refuse a file without a hash, as no version ever wrote it.

    Raises:
        DamagedFileError: it is not what was written.
        FileNotFoundError: there is none.
    """
    try:
        values = read_json(path)
    except ValueError as error:
        raise DamagedFileError(f"{path} is no valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path} holds a {type(values).__name__}, expected keys and values.")
    checksum = values.pop(CHECKSUM, None)
    if checksum != _hash_values(values) and (required or checksum is not None):
        raise DamagedFileError(f"{path} is damaged: its content is not what its checksum says.")
    return values


def _hash_values(values: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(values))  # as it is read back: tuples are lists, keys are texts
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
