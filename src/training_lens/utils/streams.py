"""Standard output and error that never end a command: broken pipes, full disks, terminals that hang up."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Any, TextIO


class BestEffortFile(io.FileIO):
    """A file whose writes never fail: what cannot be written is dropped, and later writes are tried again."""

    lost: OSError | None = None  # the first error

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # a full non-blocking pipe
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def protect_output() -> None:
    """Make standard output and error `BestEffortFile`s, and ignore hang-ups of the terminal (children too).

    Closed standard descriptors are opened as the null device: otherwise the next opened file would get their numbers,
    and with them whatever libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = _protect_stream(sys.stdout, 1), _protect_stream(sys.stderr, 2)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _protect_stream(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(BestEffortFile(number, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",  # unpaired surrogates, as JSON rows may contain
        line_buffering=os.isatty(number) or number == 2,
    )


def lost_output(stream: TextIO) -> OSError | None:
    """The error that lost some of a stream's output; None if nothing was lost or it is unknown."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    stream.flush()
    return raw.lost if isinstance(raw, BestEffortFile) else None
