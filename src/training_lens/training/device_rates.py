"""What makers publish of GPUs: memory, rates, links. All such figures of the package are here; none was measured here.

Rates are those of dense products in bf16 (fp16 on a T4) that are summed in float32: where a data sheet prints only the
rate "with sparsity", half of it. NVLink's bandwidths are half of what is printed, which counts both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

from training_lens.errors import ConfigurationError
from training_lens.utils.devices import Precision
from training_lens.utils.formatting import did_you_mean

PER_HOST = 8  # GPUs of a host, at most
TERA, GIGA, GIB = 10**12, 10**9, 2**30
ETHERNET = "assumed: one adapter of 100 Gbit/s a host"


@dataclass(frozen=True)
class Link:
    """How GPUs exchange data: bytes/s in one direction, of a GPU to the others of its host, and of a host to others.

    `network_source`: where the second figure comes from.
    """

    name: str
    bandwidth: float
    network: float = 12.5 * GIGA
    network_source: str = ETHERNET


@dataclass(frozen=True)
class DeviceRates:
    """A GPU: memory in bytes, FLOP/s of dense products in 16 bits, memory bandwidth in bytes/s, link, and the source.

    `precision`: what training.precision=auto chooses on it.
    """

    name: str
    title: str
    memory: int
    flops: float
    memory_bandwidth: float
    link: Link
    source: str
    precision: Precision = "bf16"


PCIE_3, PCIE_4 = Link("PCIe 3.0 x16", 16 * GIGA), Link("PCIe 4.0 x16", 32 * GIGA)
NVLINK_3 = Link("NVLink 3", 300 * GIGA, 200 * GIGA, "NVIDIA DGX A100 data sheet: 8 adapters of 200 Gbit/s")
NVLINK_4 = Link("NVLink 4", 450 * GIGA, 400 * GIGA, "NVIDIA DGX H100 and H200 data sheets: 8 adapters of 400 Gbit/s")
NVLINK_5 = Link("NVLink 5", 900 * GIGA, 400 * GIGA, "NVIDIA DGX B200 data sheet: 8 adapters of 400 Gbit/s")

_ALL = (
    DeviceRates("t4-16", "NVIDIA T4", 16 * GIB, 65 * TERA, 320 * GIGA, PCIE_3, "NVIDIA T4 data sheet", "fp16"),
    DeviceRates("l4-24", "NVIDIA L4", 24 * GIB, 121 * TERA, 300 * GIGA, PCIE_4, "NVIDIA L4 data sheet"),
    DeviceRates("a10g-24", "NVIDIA A10G", 24 * GIB, 70 * TERA, 600 * GIGA, PCIE_4, "NVIDIA A10G data sheet for AWS"),
    DeviceRates(
        *("rtx3090-24", "GeForce RTX 3090", 24 * GIB, 71 * TERA, 936 * GIGA, PCIE_4),
        source="NVIDIA Ampere GA102 whitepaper",
    ),
    DeviceRates(
        *("rtx4090-24", "GeForce RTX 4090", 24 * GIB, 165.2 * TERA, 1008 * GIGA, PCIE_4),
        source="NVIDIA Ada whitepaper",
    ),
    DeviceRates("l40s-48", "NVIDIA L40S", 48 * GIB, 362 * TERA, 864 * GIGA, PCIE_4, "NVIDIA L40S data sheet"),
    DeviceRates("a100-40", "NVIDIA A100 SXM", 40 * GIB, 312 * TERA, 1555 * GIGA, NVLINK_3, "NVIDIA A100 data sheet"),
    DeviceRates("a100-80", "NVIDIA A100 SXM", 80 * GIB, 312 * TERA, 2039 * GIGA, NVLINK_3, "NVIDIA A100 data sheet"),
    DeviceRates("h100-80", "NVIDIA H100 SXM", 80 * GIB, 989 * TERA, 3350 * GIGA, NVLINK_4, "NVIDIA H100 data sheet"),
    DeviceRates("h200-141", "NVIDIA H200 SXM", 141 * GIB, 989 * TERA, 4800 * GIGA, NVLINK_4, "NVIDIA H200 data sheet"),
    DeviceRates("b200-180", "NVIDIA B200", 180 * GIB, 2250 * TERA, 8000 * GIGA, NVLINK_5, "NVIDIA DGX B200 data sheet"),
)
DEVICES = {device.name: device for device in _ALL}


def find_device(name: str) -> DeviceRates:
    """The device of this name, whatever its case.

    Raises:
        ConfigurationError: it is not in the table; lists what is, and the nearest name.
    """
    key = name.strip().lower()
    if key not in DEVICES:
        raise ConfigurationError(
            f"--device {name}: no such device is in the table, which has {', '.join(DEVICES)}."
            f"{did_you_mean(key, DEVICES)}"
        )
    return DEVICES[key]
