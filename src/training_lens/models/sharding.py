"""A base model whose decoder layers are shared out over the processes of a run (FSDP2).

Each process holds an equal part of every frozen weight of a layer, and the whole layer only while it computes. All else
is whole on every process: the embedding, the output head, the last norm and the adapter, whose gradients the loop sums.
So adapters, optimizer states, checkpoints and captures are those of a run on one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training_lens.errors import ConfigurationError
from training_lens.models.experts import is_expert_adapter
from training_lens.models.model_classes import decoder_of
from training_lens.models.quantization import has_8bit_layers
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
_layers: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # each module of a sharded layer -> the layer


def shard_base(model: Any, device: torch.device, offload: bool = False) -> None:
    """Shard the frozen weights of a PEFT model's decoder layers over all processes, in place.

    Call it when the adapter is attached, and before anything holds on to weights. A model on the CPU is moved to
    `device` layer by layer, so that no device ever holds more than its share and one layer.

    Args:
        offload: keep the shares in the host's memory between uses.

    Raises:
        ConfigurationError: weights in 8 bits, or a model without a list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    decoder = decoder_of(model)
    layers = find_layers(decoder)
    _require_shardable(model, layers)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in model.parameters() if p.requires_grad or id(p) not in inside}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(device)
    if not getattr(decoder, "is_activation_checkpointing", False):  # which recomputes whole layers
        _recompute_experts(model)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": whole,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for layer in layers:
        fully_shard(layer, **options)
        _layers.update(dict.fromkeys(layer.modules(), layer))
    fully_shard(decoder, **options)
    logger.info("the base is sharded: each process holds 1/%d of %d layers", mesh.size(), len(layers))


def find_layers(decoder: Any) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules in it; [] without one."""
    lists = [list(module) for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def is_sharded(module: Any) -> bool:
    """Whether a module's frozen weights are shared out over processes."""
    return module in _layers


def has_sharded_layers(model: Any) -> bool:
    """Whether some layers of a model are sharded."""
    return any(map(is_sharded, model.modules()))


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """In the block, a module of a sharded layer has its whole weights; all processes must come here together.

    Does nothing for other modules. Cost: a message of the layer's size; memory for one layer.
    """
    layer: Any = _layers.get(module)
    if layer is None:
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def _require_shardable(model: Any, layers: list[nn.Module]) -> None:
    if not layers:
        raise ConfigurationError(
            f"distributed.base: a {type(decoder_of(model)).__name__} has no list of layers to shard; give replicated."
        )
    if has_8bit_layers(model):
        raise ConfigurationError(
            "distributed.base: layers in 8 bits change their weights as they compute, and cannot be sharded; give "
            "model.quantization=4bit, or replicated."
        )


def _recompute_experts(model: Any) -> None:
    """Let adapted experts compute again in the backward pass, instead of keeping weights for it.

    PEFT adds the update to the weights of all experts before they compute. The sum is a tensor that FSDP2 does not know
    of: kept until the backward pass, those of all layers would be the whole base on every device.
    """
    wrappers = {m for m in model.modules() if is_expert_adapter(m)}
    inner = {m.base_layer for m in wrappers}
    for wrapper in wrappers - inner:
        wrapper.forward = partial(checkpoint, wrapper.forward, use_reentrant=False)
