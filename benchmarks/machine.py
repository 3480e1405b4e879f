"""The machine that a benchmark ran on, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import statistics
import time
from typing import Any

import torch

from training_lens.utils.devices import device_name, get_device, synchronize

SIDE = {"cpu": (2048, 768, 2048), "cuda": (8192, 8192, 8192)}  # rows, inner, columns of the product that is timed
PRECISION = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"  # that the processor computes fast
SECONDS = 2.0  # of products, one after the other


def described() -> dict[str, Any]:
    """Processor, cores, system, versions; nothing that names a person or a path."""
    return {
        "device": device_name(get_device()),
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matmul_flops() -> float:
    """FLOP/s of bf16 matrix products on the device right now, the median of two seconds' worth: training's ceiling."""
    device = get_device()
    rows, inner, columns = SIDE.get(device.type, SIDE["cpu"])
    a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        synchronize(device)
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / statistics.median(seconds)
