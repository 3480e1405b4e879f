"""What servers say of a file's content, compared with the file here: so that nothing is read back to be sure of it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PART_BYTES = 50 * 2**20  # of a large upload to S3, which its ETag depends on
ETAG = re.compile(r'"?([0-9a-f]{32})(-\d+)?"?')


def vouched(info: Mapping[str, Any], local: Path) -> bool:
    """Whether a checksum that the server gives shows that it holds the content of `local`.

    S3 gives an ETag: the MD5 of the content; of an upload in parts, the MD5 of the parts' MD5s, `-`, their number
    (docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html). Google gives `md5Hash`, the
    MD5 in base64. Reads `local` once.

    Args:
        info: of the file, as fsspec gives it.

    Returns:
        False where the contents differ, and also where nothing is told that can be compared: S3's ETag of content
        encrypted with a key of KMS is no MD5.
    """
    if isinstance(told := info.get("md5Hash"), str):
        return told == base64.b64encode(_md5(local).digest()).decode()
    match = ETAG.fullmatch(str(info.get("ETag", "")))
    if match is None:
        return False
    return match[1] == (_md5_of_parts(local) if match[2] else _md5(local).hexdigest())


def _md5(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))


def _md5_of_parts(path: Path) -> str:
    """The first half of the ETag of an upload in parts of `PART_BYTES`, and the number of parts."""
    digests = b""
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            digests += hashlib.md5(part, usedforsecurity=False).digest()
    return hashlib.md5(digests, usedforsecurity=False).hexdigest()
