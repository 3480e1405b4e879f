"""The library of kernels in C: compiled where needed, called with tensors' memory on torch's own threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from training_lens.utils.compiling import CompilationError, compile_library
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
SOURCES = tuple(map(Path(__file__).with_name, ("kernels.c", "kernels.h", "attention.h", "decoding.h", "products.h")))
TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}
GRAIN = 2**15  # numbers that are worth a thread


class CallArguments(ctypes.Structure):
    """`struct call` of kernels.c."""

    _fields_ = (("at", ctypes.c_void_p * 12), ("of", ctypes.c_int64 * 12), ("by", ctypes.c_double * 2))


@dataclass(frozen=True, eq=False)
class KernelLibrary:
    """The compiled kernels, and torch's function that splits a range of items among its threads."""

    kernels: ctypes.CDLL
    share: ctypes._NamedFuncPointer

    @lru_cache(maxsize=64)  # noqa: B019 the one library lives as long as the process
    def address(self, kernel: str, dtype: torch.dtype) -> int:
        """The address of the kernel for `dtype`."""
        found = getattr(self.kernels, f"{kernel}_{TYPES[dtype]}")
        return ctypes.cast(found, ctypes.c_void_p).value or 0


@lru_cache(maxsize=1)
def load_library() -> KernelLibrary | None:
    """The kernels, compiled at the first call on a machine; None, with the reason in the log, where that fails."""
    try:
        kernels = compile_library(SOURCES, "kernels")
        share = ctypes.CDLL(str(_torch_library())).torch_parallel_for
    except (CompilationError, OSError, AttributeError, RuntimeError) as error:
        logger.info("norms, gates, attention and softmax are computed by torch, in more passes: %s", error)
        return None
    share.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    return KernelLibrary(kernels, share)


def _torch_library() -> Path:
    return next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), Path("libtorch_cpu"))


def can_compute(*tensors: Tensor) -> bool:
    """Whether there are kernels for these tensors: all on the CPU and of one dtype that kernels have."""
    x = tensors[0]
    alike = x.dtype in TYPES and all(t.device.type == "cpu" and t.dtype == x.dtype for t in tensors)
    return alike and load_library() is not None


def has_kernel(kernel: str, dtype: torch.dtype) -> bool:
    """Whether there is such a kernel for this processor; most kernels exist for all."""
    found = load_library()
    return found is not None and dtype in TYPES and hasattr(found.kernels, f"{kernel}_{TYPES[dtype]}")


def call_kernel(
    kernel: str,
    dtype: torch.dtype,
    items: int,
    at: Sequence[Tensor | None],
    of: Sequence[int] = (),
    by: Sequence[float] = (),
    size: int = GRAIN,
) -> None:
    """Let a kernel compute `items` of `size` numbers each; the kernel's comment says what `at`, `of` and `by` hold.

    The caller checks that the tensors have the layout that the kernel reads.
    """
    found = load_library()
    assert found is not None, "callers ask can_compute first"
    given = CallArguments(tuple(None if t is None else t.data_ptr() for t in at), tuple(of), tuple(by))
    address = found.address(kernel, dtype)
    failed = found.share(0, items, max(1, GRAIN // size), address, ctypes.addressof(given))
    assert not failed, f"{kernel} raises nothing"


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are computed."""
    return torch.promote_types(x.dtype, torch.float32)


def are_heads_adjacent(x: Tensor) -> bool:
    """Whether a token's heads, (..., heads, size), are adjacent in memory; tokens need not be."""
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
