"""What a machine ran out of is known by how each library says it, and nothing else is taken for it."""

from __future__ import annotations

import errno

import pytest
import torch

from training_lens.utils.resource_errors import describe_shortage


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), "memory ran out"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory ran out"),
        (ImportError("libx.so: cannot map: Cannot allocate memory"), "memory ran out"),
        (SystemError("error return without exception set"), "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "memory ran out"),
        (torch.AcceleratorError("CUDA error: out of memory", 2), "memory ran out"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory ran out"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory ran out"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"), "memory ran out"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("can't start new thread"), "no more threads"),
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (SystemError("bad argument to internal function"), None),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("out of memory lane"), None),
    ],
)
def test_a_shortage_is_named(error: Exception, found: str | None) -> None:
    described = describe_shortage(error)
    assert described is None if found is None else str(described).startswith(found)
