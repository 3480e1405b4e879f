"""Devices, number types and random state; memory: available, peak, freed, and kept in glibc's heap."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import psutil
import torch

from training_lens.errors import ConfigurationError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("cuda", "mps", "cpu")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_KEPT = 32 * 2**20  # bytes; the largest block that glibc allocates from its heap
KEPT_BY_ITSELF = 2 * LARGEST_KEPT  # bytes; glibc's default for this MMAP_THRESHOLD
ALL = 2**31 - 1
_open = False  # whether a block is active


def get_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises:
        ConfigurationError: this machine has no such device.
    """
    if name == "auto":
        name = next(filter(_count_devices, KINDS))
    try:
        device = torch.device(name)
        if (device.index or 0) < _count_devices(device.type):
            return device
    except RuntimeError:  # not the name of a device
        pass
    counts = {kind: count for kind in KINDS if (count := _count_devices(kind))}
    there = ", ".join(kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}" for kind, count in counts.items())
    raise ConfigurationError(f"model.device: '{name}' is not available here; available: {there}.")


def _count_devices(kind: str) -> int:
    """How many devices of this kind torch can use here."""
    if kind == "cpu":
        return 1
    module = torch.get_device_module(kind)
    return module.device_count() if module.is_available() else 0


def resolve_precision(asked: str, device: torch.device) -> Precision:
    """The number type of forward and backward; `auto` is fp32 on CPU and MPS, bf16 (else fp16) on CUDA.

    Raises:
        ConfigurationError: fp16 without CUDA, where there is no loss scaling.
    """
    if asked == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if has_native_bf16(device) else "fp16"
    if asked == "fp16" and device.type != "cuda":
        raise ConfigurationError("training.precision: fp16 needs CUDA (loss scaling); use bf16 or fp32 here.")
    if asked not in DTYPES:
        raise ConfigurationError(f"training.precision: '{asked}' is none of auto, fp32, bf16, fp16.")
    return asked


def has_native_bf16(device: torch.device) -> bool:
    """Whether this CUDA device multiplies bf16 itself. torch counts emulation too, which is slower than float32."""
    if torch.version.hip:
        return bool(torch.cuda.is_bf16_supported())
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Computes in `precision` in the block; adapters stay float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def move_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the tensor to the device; to CUDA without waiting, from pinned memory.

    The only place that copies without waiting: from pageable memory, or to the CPU, the copy could be read too early or
    its source freed too early (MPS does both).
    """
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def move_to_one_device(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the device of the first one that is not on the CPU, as stacking and comparing them needs."""
    tensors = list(tensors)
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    return tensors if device is None else [move_to_device(tensor, device) for tensor in tensors]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work, to measure time. A sync point on CUDA and MPS."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The product name: 'NVIDIA H200', or the CPU's model if the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def counts_memory(device: torch.device) -> bool:
    """Whether torch counts the memory of this device apart, as it does for CUDA."""
    return device.type not in ("cpu", "mps") and hasattr(torch.get_device_module(device), "max_memory_allocated")


def reset_peak(device: torch.device) -> None:
    """Reset the peak of a device that counts its memory; for the process's own peak see `reset_process_peak`."""
    if counts_memory(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def reset_process_peak() -> bool:
    """Reset this process's peak; False where that is not possible (only Linux allows it)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The peak memory in bytes: allocated on a device that counts it, resident in this process otherwise."""
    if counts_memory(device):
        return int(torch.get_device_module(device).max_memory_allocated(device))
    peak = _read_process_status("VmHWM")  # Linux: getrusage would include the process before exec
    if peak is not None:
        return peak
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def used_bytes(device: torch.device) -> int:
    """The bytes in use now, as `peak_bytes` counts them."""
    return allocated_bytes(device) if counts_memory(device) else int(psutil.Process().memory_info().rss)


def _read_process_status(name: str) -> int | None:
    """A number of bytes in /proc/self/status; None where there is no such file."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])


def available_bytes(device: torch.device) -> int | None:
    """The bytes that can still be allocated, without swap; None where nobody says."""
    if counts_memory(device):
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


def allocated_bytes(device: torch.device) -> int:
    """The bytes that tensors hold now on a device that counts its memory."""
    return int(torch.get_device_module(device).memory_allocated(device))


def free_memory() -> None:
    """Return memory that nothing refers to any more, on the CPU and on GPUs, before more is allocated.

    Call it behind an `except`, not in it: there the traceback still holds the tensors of the pass that failed.
    """
    gc.collect()
    trim_heap()
    torch.cuda.empty_cache()  # does nothing where CUDA was never used
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


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


def seed_everything(seed: int) -> None:
    """Seed torch on every device. Training uses neither `random` nor NumPy's global state."""
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """The random state of the CPU and of every CUDA device, as uint8 tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state from `rng_state`; devices that do not exist here are skipped."""
    torch.set_rng_state(state["cpu"])
    for name, tensor in state.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(name[5:]))


def diverge_rng(process: int) -> None:
    """Give a process of several a random state of its own, made from the present one; that of process 0 stays."""
    if process:
        seed_everything(int(torch.randint(2**62, (1,))) + process)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the random state at the end of the block."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng_state(state)
