"""The C library's heap: what is freed stays with the process while it will be wanted again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_KEPT = 32 * 2**20  # bytes of one block, the most that glibc takes from its heap
KEPT_BY_ITSELF = 2 * LARGEST_KEPT  # bytes that glibc would keep at most, as it comes
ALL = 2**31 - 1
_open = False  # whether a block is


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Within the block glibc keeps all that is freed, and gives it back at the end; elsewhere nothing is done.

    A training step frees its activations, and the next one takes as much again; so does a decoded token. Each page
    that the system hands out anew costs time, in virtual machines most.
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
    """Give to the system what glibc keeps; elsewhere nothing is done."""
    libc = _load_glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _load_glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
