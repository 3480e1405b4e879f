"""The library of kernels in C: compiled where needed, called with tensors' memory on torch's own threads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from training_lens.utils.compiling import CompilationError, compile_library
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
SOURCE_NAMES = ("kernels.c", "kernels.h", "panels.h", "softmax.h", "attention.h", "decoding.h", "products.h")
SOURCES = tuple(map(Path(__file__).with_name, SOURCE_NAMES))
TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}
GRAIN = 2**15  # numbers that are worth a thread


class KernelCall(ctypes.Structure):
    """The arguments of a kernel, in the order of its struct in C: `kernel` is its name, and the struct's.

    Each field has a value, a tensor (or None for null) in place of a pointer. They live as long as the call.
    """

    kernel: ClassVar[str]

    def __init__(self, **values: Any) -> None:
        assert len(values) == len(self._fields_), "every field has a value"
        self._values = values
        super().__init__(**{
            name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in values.items()
        })  # fmt: skip


def define_call(kernel: str, pointers: str, sizes: str = "", numbers: str = "") -> type[KernelCall]:
    """The arguments of a kernel: pointers (`name[count]` for an array of them), then int64, then double.

    `struct KERNEL_call` of its source has the same fields.
    """
    fields: list[tuple[str, Any]] = []
    for names, kind in ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (numbers, ctypes.c_double)):
        for name, _, count in (name.rstrip("]").partition("[") for name in names.split()):
            fields.append((name, kind * int(count) if count else kind))
    return type(f"{kernel}_call", (KernelCall,), {"kernel": kernel, "_fields_": fields})


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
        torch_library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), Path("libtorch_cpu"))
        share = ctypes.CDLL(str(torch_library)).torch_parallel_for
    except (CompilationError, OSError, AttributeError, RuntimeError) as error:
        logger.info("norms, gates, attention and softmax are computed by torch, in more passes: %s", error)
        return None
    share.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    return KernelLibrary(kernels, share)


def can_compute(*tensors: Tensor) -> bool:
    """Whether there are kernels for these tensors: all on the CPU and of one dtype that kernels have."""
    x = tensors[0]
    alike = x.dtype in TYPES and all(t.device.type == "cpu" and t.dtype == x.dtype for t in tensors)
    return alike and load_library() is not None


def has_kernel(kernel: str, dtype: torch.dtype) -> bool:
    """Whether there is such a kernel for this processor; most kernels exist for all."""
    found = load_library()
    return found is not None and dtype in TYPES and hasattr(found.kernels, f"{kernel}_{TYPES[dtype]}")


def run_kernel(call: KernelCall, dtype: torch.dtype, items: int, size: int = GRAIN) -> None:
    """Let a kernel compute `items` of `size` numbers each; the caller checks the layout of the tensors."""
    found = load_library()
    assert found is not None, "callers ask can_compute first"
    failed = found.share(0, items, max(1, GRAIN // size), found.address(call.kernel, dtype), ctypes.addressof(call))
    assert not failed, f"{call.kernel} raises nothing"


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are computed."""
    return torch.promote_types(x.dtype, torch.float32)


def are_heads_adjacent(x: Tensor) -> bool:
    """Whether a token's heads, (..., heads, size), are adjacent in memory; tokens need not be."""
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
