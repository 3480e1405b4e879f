"""Limits on the work that an input may cause, far above real inputs, and functions that enforce them."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

MB = 1 << 20
ROW_BYTES = 16 * MB  # a row, line or cell: millions of tokens; read whole and copied several times
WHOLE_JSON_BYTES = 512 * MB  # a JSON file that is not JSON lines: it takes several times its size in memory
RECORD_BYTES = 256 * MB  # a JSON file of a run, an adapter, a model or a mirror: read whole
CONFIG_BYTES = MB // 2  # a config file: a second of parsing
CONFIG_NESTING = 30  # of a YAML file: OmegaConf recurses about thirty times for each level
CONFIG_NODES = 50_000  # values of a YAML file after its aliases are expanded
TEMPLATE_BYTES = MB  # a chat template; the longest of well-known models has 20 kB
TEMPLATE_SECONDS = 10  # of one rendering
TEMPLATE_TEXT, TEMPLATE_CHARACTERS = 64 * MB, 512 * MB  # one string, and all strings built in one rendering
TEMPLATE_VALUES = 1_000_000  # in a list or object that a template serializes
UNPACKED_BYTES, UNPACKED_RATIO = 64 * MB, 50  # gzip: the larger of both, the ratio to the file's size; text has 3 to 20
KEYS = 100_000  # different keys or columns of one source: each is checked and named
NESTING = 100  # depth of lists and objects: functions recurse once for each level
EMPTY_LINES = 1_000_000  # consecutive
BAD_ROWS = 100_000  # of a source: each is kept with its reason
CHOICES = 1_000  # values of a key in a sweep


# Opening a pipe would wait for its writer; Windows has no such flag, and translates line ends without its own.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class TooMuchError(ValueError):
    """A value exceeds a limit; the message names the limit, not the place."""


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file to read it.

    Raises:
        OSError: also for devices and pipes, which may be endless or readable only once.
    """
    descriptor = os.open(path, OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is a folder, device or pipe, expected a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """The text of a file of any length; invalid UTF-8 is replaced. Raises as `open_file`."""
    with open_file(path) as file:
        return file.read().decode("utf-8", "replace")


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes.

    Raises:
        OSError: it is longer; or as for `open_file`.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(most, size) + 1)  # `read` allocates a buffer of the size asked for
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has over {most:,} bytes, expected fewer", str(path))
    return content


def read_text_end(path: Path, most: int) -> str:
    """The last `most` bytes of a file as text, also while it grows; empty without the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most))
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def load_bounded_json(text: str | bytes, **options: Any) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: also for values nested too deep, and for numbers of thousands of digits.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise TooMuchError(NESTED) from None
    if is_too_deep(value):
        raise TooMuchError(NESTED)
    return value


NESTED_KINDS = (dict, list)
NESTED = f"lists and objects are nested over {NESTING} deep"


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects in a value are nested too deep, checked without recursion."""
    level: list[Any] = [value] if isinstance(value, NESTED_KINDS) else []
    depth = 0
    while level and depth < NESTING:
        items = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level, depth = [item for item in items if isinstance(item, NESTED_KINDS)], depth + 1
    return bool(level)


class UnpackedFile(io.RawIOBase):
    """The content of an open gzip file, closed together with it, with a limit in proportion to the file's size."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._unpacked = packed, gzip.GzipFile(fileobj=packed)
        self._most = max(UNPACKED_BYTES, UNPACKED_RATIO * os.fstat(packed.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        content = self._unpacked.read(len(buffer))
        if self._unpacked.tell() > self._most:
            raise OSError(errno.EFBIG, f"unpacks to over {self._most:,} bytes, {UNPACKED_RATIO} times its size")
        buffer[: len(content)] = content
        return len(content)

    def seek(self, position: int, whence: int = 0, /) -> int:
        return self._unpacked.seek(position, whence)

    def tell(self) -> int:
        return self._unpacked.tell()

    def close(self) -> None:
        self._unpacked.close()
        self._packed.close()
        super().close()
