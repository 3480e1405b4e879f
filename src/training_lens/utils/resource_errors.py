"""What a machine ran out of, as libraries say it: memory, threads, room on a disk. Imports none of them."""

from __future__ import annotations

import errno

OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "Cannot allocate memory"),
    *("STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation"),  # cuBLAS, cuDNN and others of CUDA's libraries
)
LOST_ERROR = "error return without exception set"  # CPython, where memory runs out while it imports a module
OUT_OF_THREADS = ("can't start new thread", "ThreadPoolBuildError", "Failed to launch worker thread")  # or Rust's
OUT_OF_ROOM = ("No space left on device", "Disk quota exceeded")  # of the system, and of libraries in Rust


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the CPU (where torch only says so in the message)."""
    names = [kind.__name__ for kind in type(error).__mro__]  # torch's class, which is not imported here
    is_torch = isinstance(error, RuntimeError) and "OutOfMemoryError" in names
    is_said = isinstance(error, RuntimeError | ImportError) and any(text in str(error) for text in OUT_OF_MEMORY)
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_lost = isinstance(error, SystemError) and LOST_ERROR in str(error)
    return is_torch or is_said or is_refused or is_lost or isinstance(error, MemoryError)


def raise_out_of_memory(error: BaseException) -> None:
    """Raise the error again if memory ran out, where any other one says that something is done in another way."""
    if is_out_of_memory(error):
        raise error


def describe_shortage(error: BaseException) -> str | None:
    """What ran out and what to do about it; None for other errors."""
    if is_out_of_memory(error):
        return "memory ran out. Close other programs, give this one more, or use a smaller model or batch."
    if any(text in str(error) for text in OUT_OF_THREADS):
        return "no more threads could be started. Raise the limit (ulimit -u, or the container's), or close programs."
    if any(text in str(error) for text in OUT_OF_ROOM):
        return f"the disk is full ({error}). Make room there, or write elsewhere."
    return None
