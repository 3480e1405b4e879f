"""A device of torch's own that is not the CPU and really computes, on a machine that has no other device.

torch's PrivateUse1 slot gets a Python backend called "sim". Its tensors are wrappers around CPU tensors, so every
result is that of the CPU. What differs is what differs on a GPU: a tensor there and one on the CPU may not meet in an
operation (scalars of no dimension may, as on CUDA), each value that travels to Python or to the CPU waits for the
device, and its memory is counted and may run out. Not covered: what only a GPU has (pinned memory, streams, its own
kernels and their rounding).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "sim"
FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm")
_library = torch.library.Library("aten", "IMPL")


@dataclass
class Memory:
    """Bytes that the simulated device holds and held at most, and how many it has; storages count once."""

    capacity: int = 2**40
    allocated: int = 0
    peak: int = 0
    holders: Counter[int] = field(default_factory=Counter)  # address of a storage -> tensors that hold it

    def hold(self, inner: torch.Tensor) -> tuple[int, int]:
        """Count a tensor's storage, if it is new; its address and bytes. Raises where it does not fit."""
        storage = inner.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self.holders[address]:
            if self.allocated + size > self.capacity:
                raise torch.OutOfMemoryError(f"sim out of memory. Tried to allocate {size} bytes.")
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self.holders[address] += 1
        return address, size

    def release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.allocated -= size


memory = Memory()


class _Backend(_DummyBackendModule):
    """`torch.sim`, as `torch.cuda` is for CUDA."""

    def memory_allocated(self, device: Any = None) -> int:
        return memory.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return memory.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory.peak = memory.allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return memory.capacity - memory.allocated, memory.capacity

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def register() -> torch.device:
    """The simulated device; torch knows it from the first call on, for the whole process.

    Call it before the product is imported: `no_grad` stands for `inference_mode`, which a Python tensor cannot have.
    """
    if torch._C._get_privateuse1_backend_name() != NAME:
        torch.inference_mode = _run_without_gradients  # type: ignore[assignment, misc]
        _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Backend())
        _library.impl("empty.memory_format", _empty, "PrivateUse1")
        _library.impl("empty_strided", _empty_strided, "PrivateUse1")
        _library.impl("_copy_from", _copy_from, "PrivateUse1")
        for name in FACTORIES:
            _library.impl(name, partial(_make, name), "PrivateUse1")
    return torch.device(NAME, 0)


def _run_without_gradients(mode: bool = True) -> Any:
    return torch.no_grad() if mode else nullcontext()


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    return SimulatedTensor(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _make(name: str, *args: Any, **options: Any) -> torch.Tensor:
    """A tensor made on the CPU: torch would make an empty one on the device, and resize it."""
    packet, _, overload = name.partition(".")
    options = {key: value for key, value in options.items() if key == "dtype"}
    return SimulatedTensor(getattr(getattr(aten, packet), overload or "default")(*args, **options, device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What `torch.tensor(..., device="sim")` ends in; it leaves out the wrapper's own dispatch."""
    unwrap(target).copy_(unwrap(source))
    return target


def unwrap(tensor: Any) -> Any:
    return tensor.inner if isinstance(tensor, SimulatedTensor) else tensor


class DeviceMismatchError(RuntimeError):
    """Tensors of two devices in one operation, as CUDA refuses them."""


class SimulatedTensor(torch.Tensor):
    """A tensor that says it is on the simulated device and keeps its values on the CPU."""

    inner: torch.Tensor
    release: Any  # takes its bytes from the device's

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> SimulatedTensor:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=register(),
            requires_grad=requires_grad,
        )
        wrapper.hold(inner)
        return wrapper

    def hold(self, inner: torch.Tensor) -> None:
        self.inner = inner
        self.release = weakref.finalize(self, memory.release, *memory.hold(inner))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor({self.inner!r})"

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.release()
        self.hold(unwrap(value))

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()  # which safetensors and PEFT compare to find shared memory

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert sim:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


@dataclass
class Recording:
    """What the operations on the simulated device did."""

    synchronizations: Counter[str] = field(default_factory=Counter)  # "operation at file:line" -> times
    operations: int = 0


_recordings: list[Recording] = []
WAITS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_dim.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
STRICT = {aten.stack.default, aten.cat.default}  # these take no scalar of the CPU either
COPIES = {aten._to_copy.default, aten.copy_.default}


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute one operation on the wrapped CPU tensors; refuse tensors of two devices."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    refuse_strays(func, tensors)
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else register()
    if func is aten.copy_.default and not isinstance(args[0], SimulatedTensor):
        target = args[0].device
    record(func, args, target)
    if func is aten._fused_sdp_choice.default:
        return 0  # the composite form, whose parts come back here
    inner_args, inner_kwargs = pytree.tree_map_only(SimulatedTensor, unwrap, (args, kwargs))
    if "device" in kwargs:
        inner_kwargs["device"] = torch.device("cpu") if target.type == NAME else target
    result = func(*inner_args, **inner_kwargs)
    for tensor in tensors:
        if isinstance(tensor, SimulatedTensor) and tensor.shape != tensor.inner.shape:
            raise NotImplementedError(f"{func} resized its output; make it on the CPU first, as FACTORIES are")
    if target.type != NAME:
        is_view = any(result is x for x in inner_args)
        return args[0] if func is aten.copy_.default else result.clone() if is_view else result
    wrapped = pytree.tree_map_only(torch.Tensor, SimulatedTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def refuse_strays(func: Any, tensors: list[torch.Tensor]) -> None:
    """CUDA's rule: one device for all, but for scalars of no dimension, indices and copies."""
    strays = [x for x in tensors if not isinstance(x, SimulatedTensor) and (x.dim() > 0 or func in STRICT)]
    if func in COPIES or (func in INDEXING and all(not x.dtype.is_floating_point for x in strays)):
        return
    if strays:
        raise DeviceMismatchError(f"{func}: expected all tensors to be on the same device, but found sim:0 and cpu")


def record(func: Any, args: Any, target: torch.device) -> None:
    """Count the operation, and the wait for the device that it is."""
    waits = func in WAITS or target.type != NAME
    waits |= func in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    for recording in _recordings:
        recording.operations += 1
        if waits:
            recording.synchronizations[f"{func} at {find_caller()}"] += 1


def find_caller() -> str:
    """The innermost line of the product that is running."""
    frame = sys._getframe()
    while frame is not None and "/training_lens/" not in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename.rsplit('/training_lens/', 1)[1]}:{frame.f_lineno}" if frame else "elsewhere"


@contextmanager
def record_device() -> Iterator[Recording]:
    """What the operations on the simulated device do in the block."""
    recording = Recording()
    _recordings.append(recording)
    try:
        yield recording
    finally:
        _recordings.remove(recording)
