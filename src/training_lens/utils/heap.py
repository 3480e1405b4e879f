"""glibc's heap: keeps freed memory in the process while it will be needed again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_KEPT = 32 * 2**20  # bytes; the largest block that glibc allocates from its heap
KEPT_BY_ITSELF = 2 * LARGEST_KEPT  # bytes; glibc's default for this MMAP_THRESHOLD
ALL = 2**31 - 1
_open = False  # whether a block is active


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """In the block glibc keeps freed memory; it returns it to the system at the end. Does nothing without glibc.

    A training step frees its activations and the next one allocates as much again; so does a decoding step. Each new
    page from the system costs time, most of all in virtual machines.
    """
    global _open
    libc = _load_glibc()
    if libc is None or _open:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(TRIM_THRESHOLD, ALL)
    _open = True
    try:
        yield
    finally:
        _open = False
        libc.mallopt(TRIM_THRESHOLD, KEPT_BY_ITSELF)
        trim_heap()


def trim_heap() -> None:
    """Return the memory that glibc keeps to the system; does nothing without glibc."""
    libc = _load_glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _load_glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
