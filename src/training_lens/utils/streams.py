"""Standard output and error that never end a command: a reader that leaves, a full disk, a terminal that hangs up."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Any, TextIO


class BestEffortFile(io.FileIO):
    """A descriptor to which writing always succeeds: what the system does not take is dropped.

    Each write is tried anew, for a full disk may have room again. `lost` is the first error.
    """

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block, and is full
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def protect_output() -> None:
    """Let standard output and error be `BestEffortFile`s, and a hang-up of the terminal end nothing.

    Descriptors that are closed become the null device: the next file to be opened would get their numbers, and with
    them whatever libraries print. Children inherit that hang-ups are ignored.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
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
        errors="backslashreplace",  # half a character of UTF-16, as JSON rows may hold
        line_buffering=os.isatty(number) or number == 2,
    )


def lost_output(stream: TextIO) -> OSError | None:
    """Why some of what was written to a stream did not arrive; None: all did, or that cannot be told."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    stream.flush()
    return raw.lost if isinstance(raw, BestEffortFile) else None
