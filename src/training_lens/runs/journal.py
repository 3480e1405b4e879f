"""Journals: JSON lines that a run appends while it trains, and that other processes read meanwhile.

A journal is also the send queue of a run: a sender remembers a `JournalPosition` instead of keeping lines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from training_lens.runs.journal_table import TABLE_BYTES, LineTable, parse_table
from training_lens.utils.files import redact_values_for_file, replace_non_finite, write_text
from training_lens.utils.integrity import read_line, seal_line
from training_lens.utils.limits import open_file, read_text
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


class JournalPosition(NamedTuple):
    """How far a journal was read: all lines of steps below `step`, and the first `lines` lines of that step.

    It stays valid when a run resumes, drops the lines after its checkpoint and writes them again.
    """

    step: int = -1
    lines: int = 0


@dataclass(frozen=True)
class JournalEntry:
    """One line of a journal, and the position after it."""

    values: Mapping[str, Any]
    position: JournalPosition

    @property
    def step(self) -> int:
        return self.position.step


class Journal:
    """Appends lines to one file, each with its `step`, in the order of steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def open(self, after: int) -> None:
        """Open the file to append. Lines after the step that a run resumes from are dropped: it writes them again."""
        if self.path.exists():
            lines = read_text(self.path).splitlines() if after else []
            damaged = tuple(number for number, line in enumerate(lines[:-1], 1) if parse_line(line) is None)
            if damaged:  # a kill may have cut the last one short
                warn_of_damaged_lines(self.path, damaged)
            kept = [line for line in lines if (values := parse_line(line)) is not None and values["step"] <= after]
            write_text(self.path, "".join(f"{line}\n" for line in kept), verbatim=True)
        elif after:
            logger.warning("%s is missing: it starts again after step %d", self.path, after)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line, which must have the key `step`, and flush it. `time` (seconds since the epoch) is added."""
        assert self._file is not None, "open the journal first"
        line = replace_non_finite(redact_values_for_file({**values, "time": round(time.time(), 3)}, self.path))
        self._file.write(seal_line(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # each line was flushed: what fails here was raised by `write`
                self._file.close()


class JournalReader:
    """Reads a journal from a position on, while another process appends to it.

    It remembers its offset, so that a read costs only the new lines, and starts over if the file was replaced. The
    file is closed between reads.
    """

    def __init__(self, path: Path, position: JournalPosition | None = None) -> None:
        self.path, self.position = path, position or JournalPosition()
        self._inode, self._offset, self._seen = 0, 0, JournalPosition()

    def read(self, most: int) -> list[JournalEntry]:
        """At most `most` new lines. A line that is still being written is left for the next read."""
        if (file := self._open()) is None:
            return []
        with file:
            return self._read_entries(file, most)

    def read_table(self, names: Sequence[str]) -> LineTable | None:
        """The next MB of new lines as columns of numbers; a table without lines where they were read before.

        None where less is left, or a line needs a look of its own, as a damaged one: `read` goes on from there.

        Args:
            names: keys of the lines, whose numbers become columns.
        """
        if (file := self._open()) is None:
            return None
        with file:
            block = file.read(TABLE_BYTES)
        block = block[: block.rfind(b"\n") + 1] if len(block) == TABLE_BYTES else b""
        table = parse_table(block, names) if block else None
        return None if table is None else self._take_table(table, len(block))

    def _take_table(self, table: LineTable, size: int) -> LineTable | None:
        """Move behind the lines of a table; None, and stay, where only some of them are new."""
        first, last = int(table.steps[0]), int(table.steps[-1])
        is_known = last < self.position.step
        is_new = first > self.position.step or (self._seen == self.position and first == self._seen.step)
        if not (is_known or is_new):
            return None
        lines = int(np.count_nonzero(table.steps == last))
        self._seen = JournalPosition(last, lines + (self._seen.lines if last == self._seen.step else 0))
        self._offset += size
        self.position = max(self.position, self._seen)
        return table.choose_lines(np.full(len(table.steps), is_new))

    def _open(self) -> IO[bytes] | None:
        """The file at its first line that was not read; None if there is no file."""
        try:
            file = open_file(self.path)
        except FileNotFoundError:
            return None
        inode = os.fstat(file.fileno()).st_ino
        if inode != self._inode:  # a resumed run replaced the file
            self._inode, self._offset, self._seen = inode, 0, JournalPosition()
        file.seek(self._offset)
        return file

    def _read_entries(self, file: IO[bytes], most: int) -> list[JournalEntry]:
        entries: list[JournalEntry] = []
        while len(entries) < most and (line := file.readline()).endswith(b"\n"):
            self._offset += len(line)
            if (values := parse_line(line)) is None:
                continue
            step = int(values["step"])
            self._seen = JournalPosition(step, self._seen.lines + 1 if step == self._seen.step else 1)
            if self._seen > self.position:
                self.position = self._seen
                entries.append(JournalEntry(values, self._seen))
        return entries


@lru_cache(maxsize=64)
def warn_of_damaged_lines(path: Path, numbers: tuple[int, ...]) -> None:
    """Warn of damaged lines of a journal, once per state of the file however often it is read."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    logger.warning("%s is damaged: its lines %s are skipped", path, shown)


def parse_line(line: str | bytes) -> dict[str, Any] | None:
    """The values of a line; None for one that is damaged or cut short."""
    values = read_line(line)
    return values if values is not None and isinstance(values.get("step"), int) else None
