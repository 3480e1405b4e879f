"""What training an adapter costs on several devices: memory of each, and time, under three layouts of the base.

Arithmetic alone: sizes of a model (`model_shape`), published rates of devices (`device_rates`) and the constants of the
memory budget go in, sums with their terms come out. What is assumed is an interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from training_lens.training.device_rates import PER_HOST, DeviceRates
from training_lens.training.loop.memory_budget import (
    BUFFER_BYTES,
    BYTES_PER_TRAINED,
    LEAST_TOKENS,
    USABLE_SHARE,
    Footprint,
    affordable_tokens,
)
from training_lens.training.model_shape import ModelShape
from training_lens.utils.formatting import format_count, format_size, pluralize

Layout = Literal["replicated", "sharded", "replicated 4-bit", "sharded 4-bit"]
Basis = Literal["counted", "published", "measured here", "assumed"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
CUDA = torch.device("cuda")
RESERVED_BYTES = 2**30  # of a device: the driver, CUDA and NCCL
# FSDP2 holds the layer that computes, the next one, and the message that it is copied from; our kernels join the
# weights of layers with one input once more.
GATHERED_LAYERS = 4
NF4_BLOCK, NF4_SUPERBLOCK = 64, 256  # weights that share a scale of one byte; scales that share one in float32
ACTIVATION_BYTES = 2  # bf16 or fp16
# Llama 3 405B was trained at 38 to 43 % of the published rate (arXiv 2407.21783, table 4), PaLM 540B at 46 %
# (arXiv 2204.02311, table 3); one GPU without messages can do better, adapters and short micro-batches cost.
UTILISATION = (0.35, 0.55)
BANDWIDTH_SHARE = (0.5, 0.85)  # of a link's or memory's published bandwidth
COUNTS = (1, 2, 4, *(PER_HOST * 2**power for power in range(5)))  # 1 to 128 devices


@dataclass(frozen=True)
class Workload:
    """What is trained: examples of a step, their mean tokens, tokens of the whole run, bytes of a weight.

    `layouts`: those that are compared; `checkpointing`: whether gradient checkpointing is tried, in this order.
    """

    examples: int
    example_tokens: int
    run_tokens: int
    weight_bytes: int = 2
    layouts: tuple[Layout, ...] = LAYOUTS
    checkpointing: tuple[bool, ...] = (False, True)

    def count_tokens(self, devices: int) -> int:
        """Tokens of a step on the device that has most of them; devices share a step's examples."""
        return math.ceil(self.examples / devices) * self.example_tokens


@dataclass(frozen=True)
class MemoryTerm:
    """A term of a device's memory, in bytes, with how it is computed and what that rests on."""

    name: str
    bytes: float
    arithmetic: str
    basis: Basis


@dataclass(frozen=True)
class TimeTerm:
    """A term of a step's time: seconds at the best and the worst rate that is assumed."""

    name: str
    low: float
    high: float
    arithmetic: str
    basis: Basis


@dataclass(frozen=True)
class LayoutCost:
    """One layout on a number of devices.

    Args:
        usable: bytes of a device that the run may plan with.
        micro_batch_tokens: of the largest pass: what memory holds of a device's part of a step, or the longest example.
        host_bytes: that the processes of a host take in its own memory while they load the base, at most.
        step_seconds, run_seconds: least and most.
    """

    layout: Layout
    devices: int
    is_checkpointed: bool
    memory: tuple[MemoryTerm, ...]
    usable: float
    micro_batch_tokens: int
    host_bytes: float
    time: tuple[TimeTerm, ...]
    step_seconds: tuple[float, float]
    run_seconds: tuple[float, float]
    tokens_per_second: tuple[float, float]

    @property
    def total(self) -> float:
        return sum(term.bytes for term in self.memory)

    @property
    def missing(self) -> float:
        """Bytes of a device by which it does not fit; 0 if it fits."""
        return max(0.0, self.total - self.usable)

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    @property
    def hosts(self) -> int:
        return math.ceil(self.devices / PER_HOST)


def compare_layouts(shape: ModelShape, device: DeviceRates, devices: int, workload: Workload) -> list[LayoutCost]:
    """Each layout on so many devices, without gradient checkpointing where it fits without.

    A base is sharded over two devices or more.
    """
    found = []
    for layout in workload.layouts:
        if is_sharded(layout) and devices == 1:
            continue
        tried = [cost_layout(shape, device, devices, workload, layout, way) for way in workload.checkpointing]
        found.append(next((cost for cost in tried if cost.fits), tried[-1]))
    return found


def choose_layout(costs: list[LayoutCost]) -> LayoutCost | None:
    """The fastest layout that fits with weights in 16 bits, else that with 4 bits; None if none fits."""
    fitting = [cost for cost in costs if cost.fits]
    plain = [cost for cost in fitting if not is_4bit(cost.layout)]
    return min(plain or fitting, key=lambda cost: sum(cost.step_seconds), default=None)


def find_smallest(shape: ModelShape, device: DeviceRates, workload: Workload) -> dict[Layout, LayoutCost]:
    """For each layout the smallest of `COUNTS` on which it fits; where it fits on none, the one that lacks least."""
    found = [cost for devices in COUNTS for cost in compare_layouts(shape, device, devices, workload)]
    by_layout = {name: [cost for cost in found if cost.layout == name] for name in workload.layouts}
    return {name: min(costs, key=lambda cost: cost.missing) for name, costs in by_layout.items()}  # the first of equals


def is_sharded(layout: Layout) -> bool:
    """Whether each device holds a share of the decoder layers."""
    return layout.startswith("sharded")


def is_4bit(layout: Layout) -> bool:
    """Whether the base's linear layers are in 4 bits."""
    return layout.endswith("4-bit")


def cost_layout(
    shape: ModelShape, device: DeviceRates, devices: int, workload: Workload, layout: Layout, is_checkpointed: bool
) -> LayoutCost:
    """Memory and time of one layout.

    It fits if the run's own rule (`affordable_tokens`) gives a micro-batch that holds the longest example.
    """
    fixed = list(_list_fixed_memory(shape, workload, layout, devices))
    saved = ACTIVATION_BYTES * (shape.saved_checkpointed if is_checkpointed else shape.saved)
    free = device.memory - RESERVED_BYTES
    needs = Footprint(sum(term.bytes for term in fixed), saved)
    longest = max(LEAST_TOKENS, shape.seq_len)
    fits = needs.fixed + longest * saved <= USABLE_SHARE * free
    most = min(affordable_tokens(free, needs, CUDA), workload.count_tokens(devices))
    tokens = max(longest, most) if fits else longest
    how = f"{tokens:,} tokens x {format_size(saved)}, at most"
    activations = MemoryTerm("activations", tokens * saved, how, "measured here")
    times = tuple(_list_times(shape, device, devices, workload, layout, (tokens, is_checkpointed)))
    step = _add_times(times)
    tokens_of_step = workload.examples * workload.example_tokens
    steps = math.ceil(workload.run_tokens / tokens_of_step)
    return LayoutCost(
        layout=layout,
        devices=devices,
        is_checkpointed=is_checkpointed,
        memory=(*fixed, activations),
        usable=USABLE_SHARE * free,
        micro_batch_tokens=tokens,
        host_bytes=_count_host_bytes(shape, workload, layout),
        time=times,
        step_seconds=step,
        run_seconds=(steps * step[0], steps * step[1]),
        tokens_per_second=(tokens_of_step / step[1], tokens_of_step / step[0]),
    )


def count_layer_bytes(shape: ModelShape, layout: Layout, devices: int, weight_bytes: int) -> int:
    """Bytes of the base's decoder layers on one device: the first, whose shards are largest."""
    shards = devices if is_sharded(layout) else 1
    total = 0
    for group in shape.weights:
        if group.is_layer and is_4bit(layout) and group.is_linear:
            total += group.count * _count_nf4_bytes(group.numbers, shards)
        elif group.is_layer:
            total += group.count * math.ceil(group.rows / shards) * (group.numbers // group.rows) * weight_bytes
    return total


def _count_nf4_bytes(numbers: int, shards: int) -> int:
    """Bytes of a weight in NF4 with double quantization (arXiv 2305.14314): half a byte a number, and its scales.

    Shards are of the packed bytes alone: the scales stay whole on every device.
    """
    blocks = math.ceil(numbers / NF4_BLOCK)
    return math.ceil(math.ceil(numbers / 2) / shards) + blocks + 4 * math.ceil(blocks / NF4_SUPERBLOCK)


def _count_host_bytes(shape: ModelShape, workload: Workload, layout: Layout) -> float:
    """A base that is to be sharded is read into the memory of its host, by one process at a time."""
    if not is_sharded(layout):
        return 0.0
    whole: Layout = "replicated 4-bit" if is_4bit(layout) else "replicated"
    layers = count_layer_bytes(shape, whole, 1, workload.weight_bytes)
    return layers + shape.count(in_layers=False) * workload.weight_bytes


def _list_fixed_memory(shape: ModelShape, workload: Workload, layout: Layout, devices: int) -> Iterator[MemoryTerm]:
    """What a device holds whatever the micro-batch."""
    size, layers, rest = workload.weight_bytes, shape.count(in_layers=True), shape.count(in_layers=False)
    shards = f" / {devices} devices" if is_sharded(layout) else ""
    how = f"{format_count(layers)} x {size} bytes{shards}"
    if is_4bit(layout):
        how = f"{format_count(layers)} x (0.5 bytes in NF4{shards} + 0.016 bytes of scales)"
    yield MemoryTerm("decoder layers", count_layer_bytes(shape, layout, devices, size), how, "counted")
    yield MemoryTerm(
        "embedding, output head, last norm",
        rest * size,
        f"{format_count(rest)} x {size} bytes, on each device",
        "counted",
    )
    yield MemoryTerm(
        "adapter, gradients, Adam's moments",
        shape.trainable * BYTES_PER_TRAINED,
        f"{format_count(shape.trainable)} x (4 + 4 + 8) bytes, on each device",
        "counted",
    )
    if devices > 1:
        yield MemoryTerm(
            "message of gradients", 4 * shape.trainable, f"{format_count(shape.trainable)} x 4 bytes", "counted"
        )
    if is_sharded(layout):
        gathered = 0.5 if is_4bit(layout) else size
        yield MemoryTerm(
            "gathered layers",
            GATHERED_LAYERS * shape.largest_layer * gathered,
            f"{GATHERED_LAYERS} layers x {format_count(shape.largest_layer)} x {gathered} bytes",
            "assumed",
        )
        if shape.has_parameter_adapters:
            how = f"2 x 1 layer x {format_count(shape.largest_layer)} x {size} bytes"
            yield MemoryTerm("experts with their update", 2 * shape.largest_layer * size, how, "assumed")
    if is_4bit(layout):
        yield MemoryTerm(
            "dequantized weights",
            shape.largest_layer * ACTIVATION_BYTES,
            f"1 layer x {format_count(shape.largest_layer)} x {ACTIVATION_BYTES} bytes",
            "assumed",
        )
    yield MemoryTerm("logits, libraries", BUFFER_BYTES, "512 MiB", "assumed")


def count_token_flops(shape: ModelShape, example_tokens: int, is_checkpointed: bool) -> float:
    """FLOPs of a token, forward and backward.

    A weight costs 2 forward and 2 backward, for the gradient of its input: a frozen one has none of its own. One of the
    adapter costs 6. Causal attention over n tokens costs 2 n for each number of a query forward and twice that
    backward. Gradient checkpointing adds a forward pass.
    """
    forward = 2 * (shape.multiplied + shape.trainable + example_tokens * shape.attention_width)
    backward = 2 * shape.multiplied + 4 * (shape.trainable + example_tokens * shape.attention_width)
    return forward + backward + (forward if is_checkpointed else 0)


def _list_times(
    shape: ModelShape,
    device: DeviceRates,
    devices: int,
    workload: Workload,
    layout: Layout,
    passes: tuple[int, bool],
) -> Iterator[TimeTerm]:
    """The terms of a step's time.

    Args:
        passes: tokens of a micro-batch, and whether gradients are checkpointed.
    """
    micro_batch, is_checkpointed = passes
    tokens = workload.count_tokens(devices)
    micro_batches = math.ceil(tokens / micro_batch)
    flops = count_token_flops(shape, workload.example_tokens, is_checkpointed)
    yield _time(
        ("compute", flops * tokens, device.flops, UTILISATION),
        f"{tokens:,} tokens x {flops / 1e9:,.1f} GFLOP / "
        f"({device.flops / 1e12:,.0f} TFLOP/s x {_describe_shares(UTILISATION)})",
    )
    if is_4bit(layout):
        count = 3 if is_checkpointed else 2
        weights = sum(group.numbers * group.count for group in shape.weights if group.is_linear)
        moved = micro_batches * count * weights * (0.516 + ACTIVATION_BYTES)
        yield _time(
            ("dequantize", moved, device.memory_bandwidth, BANDWIDTH_SHARE),
            f"{pluralize(micro_batches, 'micro-batch')} x {count} x {format_count(weights)} x 2.516 bytes / "
            f"({device.memory_bandwidth / 1e9:,.0f} GB/s x {_describe_shares(BANDWIDTH_SHARE)})",
        )
    if devices == 1:
        return
    bandwidth = min(device.link.bandwidth, device.link.network) if devices > PER_HOST else device.link.bandwidth
    rate, others = f"({bandwidth / 1e9:,.0f} GB/s x {_describe_shares(BANDWIDTH_SHARE)})", f"{devices - 1}/{devices}"
    if is_sharded(layout):
        layers = shape.count(in_layers=True) * (0.5 if is_4bit(layout) else workload.weight_bytes)
        yield _time(
            ("gather layers", micro_batches * 2 * layers * (devices - 1) / devices, bandwidth, BANDWIDTH_SHARE),
            f"{pluralize(micro_batches, 'micro-batch')} x 2 x {others} x {format_size(layers)} / {rate}",
        )
    summed = 4 * shape.trainable
    yield _time(
        ("sum gradients", 2 * summed * (devices - 1) / devices, bandwidth, BANDWIDTH_SHARE),
        f"2 x {others} x {format_size(summed)} / {rate}",
    )


def _time(term: tuple[str, float, float, tuple[float, float]], arithmetic: str) -> TimeTerm:
    """A term of an amount over a published rate, of which a share is reached: the lower and the higher one assumed."""
    name, amount, rate, (least, most) = term
    return TimeTerm(name, amount / (rate * most), amount / (rate * least), arithmetic, "assumed")


def _describe_shares(shares: tuple[float, float]) -> str:
    return f"{shares[0] * 100:.0f} to {shares[1]:.0%}"


def _add_times(terms: tuple[TimeTerm, ...]) -> tuple[float, float]:
    """A step's time: at best messages hide behind the computation or it behind them, at worst nothing overlaps."""
    messages = [term for term in terms if term.name in ("gather layers", "sum gradients")]
    rest = [term for term in terms if term not in messages]
    low = max(sum(term.low for term in rest), sum(term.low for term in messages))
    return low, sum(term.high for term in terms)
