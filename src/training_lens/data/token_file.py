"""A memory-mapped Arrow file of examples, verified before it is read.

Next to the file are its checksums (XXH3, 128 bits): one for each record batch's tokens, verified before the batch is
first read, and one for all other bytes, verified when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from training_lens.errors import DamagedFileError
from training_lens.utils.integrity import read_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Checksums:
    """The checksums of an examples file.

    `tokens` holds (start, end, checksum) in bytes for each record batch's tokens; `rest` is the checksum of all other
    bytes: schema, other columns, footer.
    """

    size: int
    rest: str
    tokens: list[tuple[int, int, str]]

    def list_other_spans(self) -> Iterator[tuple[int, int]]:
        """The byte ranges that are not tokens."""
        borders = [0, *(border for start, end, _ in self.tokens for border in (start, end)), self.size]
        return zip(borders[::2], borders[1::2], strict=True)


def checksums_path(path: Path) -> Path:
    return path.with_suffix(".checksums.json")


def compute_file_checksums(path: Path, ends: Sequence[int]) -> Checksums:
    """The checksums of a file just written, whose record batches end at `ends`."""
    content = _map_file(path)
    batches = pa.ipc.open_file(content).read_all().column("input_ids").chunks
    places = [(ids.values.buffers()[1].address - content.address, end) for ids, end in zip(batches, ends, strict=True)]
    tokens = [(start, end, _compute_checksum(content, [(start, end)])) for start, end in places]
    size = content.size
    return Checksums(size, _compute_checksum(content, Checksums(size, "", tokens).list_other_spans()), tokens)


def _map_file(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _compute_checksum(content: pa.Buffer, places: Iterable[tuple[int, int]]) -> str:
    digest = xxhash.xxh3_128()
    for start, end in places:
        digest.update(content[start:end])
    return digest.hexdigest()


class TokenTable:
    """The columns of examples in memory."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @property
    def content_hash(self) -> str:
        """A hash of a file's tokens and loss masks; empty for examples in memory."""
        return ""

    def require_tokens(self, row: int) -> None:
        """Verify the tokens of a row before they are read."""

    def require_all_tokens(self) -> None:
        """Verify all tokens."""
        for row in range(self.table.num_rows):
            self.require_tokens(row)


class TokenFile(TokenTable):
    """The columns of a memory-mapped examples file. Everything is verified before it is read.

    Args:
        rebuild: writes the file again if tokens are damaged.

    Raises:
        DamagedFileError: the file or its checksums are missing or damaged; for tokens see `require_tokens`.
    """

    def __init__(self, path: Path, rebuild: Callable[[], object] | None = None) -> None:
        self._path, self._rebuild, self._lock = path, rebuild, threading.RLock()
        self._open_file()

    def _open_file(self) -> None:
        try:
            values = read_sealed(checksums_path(self._path), required=True)
            tokens = [tuple(place) for place in values["tokens"]]
            self._checksums = Checksums(values["size"], values["rest"], tokens)
        except FileNotFoundError as error:
            raise DamagedFileError(f"{error.filename} is missing.") from error
        self._content = _map_file(self._path)
        rest = _compute_checksum(self._content, self._checksums.list_other_spans())
        if (self._content.size, rest) != (self._checksums.size, self._checksums.rest):
            raise DamagedFileError(f"{self._path} is damaged: it is not what its checksums say.")
        super().__init__(pa.ipc.open_file(self._content).read_all())
        self._ends = np.cumsum([len(chunk) for chunk in self.table.column("row").chunks])
        self._is_checked = [False] * len(self._ends)

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(json.dumps([checksum for *_, checksum in self._checksums.tokens]).encode()).hexdigest()

    def require_tokens(self, row: int) -> None:
        """Verify the record batch of a row, once; damaged tokens are rebuilt.

        Raises:
            DamagedFileError: damaged, and there is no `rebuild`.
        """
        batch = int(np.searchsorted(self._ends, row, side="right"))
        if not self._is_checked[batch]:
            with self._lock:
                self._check_batch(batch)

    def _check_batch(self, batch: int) -> None:
        start, end, checksum = self._checksums.tokens[batch]
        if _compute_checksum(self._content, [(start, end)]) != checksum:
            damage = f"{self._path} is damaged: the tokens in bytes {start} to {end} are not as written."
            if self._rebuild is None:
                raise DamagedFileError(damage)
            logger.warning("%s The rows are tokenized again.", damage)
            self._rebuild()
            self._open_file()
        self._is_checked[batch] = True
