"""An adapter whose update is multiplied by a number: W + scale (W' - W), W being the base's own weight.

It is an adapter of the same kind and size, so that every program that loads adapters can use it:

- LoRA, W' = W + s B A: B is multiplied. PiSSA is a LoRA on the unchanged base here, so scale 0 is the base itself.
- DoRA, whose row i is m_i (w_i + d_i) / n_i with d = s B A and n_i = |w_i + d_i| (arXiv 2402.09353): the row becomes
  c_i w_i + e_i d_i with e_i = scale m_i / n_i and c_i = 1 - scale + e_i, which is a DoRA whose B has row e_i / c_i B_i
  and whose magnitude is c_i |w_i + e_i / c_i d_i|.
- A module trained whole, and rows of new tokens: each number goes so far from the base's towards the trained one.

Scale 1 changes nothing. At scale 0 a LoRA computes exactly the base, and a DoRA up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training_lens.errors import AdapterError
from training_lens.models.experts import adapted_path

SMALLEST_ROW_FACTOR = 1e-6  # of DoRA's c, which may cross 0 beyond scale 1


@torch.no_grad()
def scale_adapter(adapted: Any, scale: float) -> None:
    """Multiply the update of a PEFT model's adapter, in place. Cost: for DoRA one product B A a module.

    Raises:
        AdapterError: names the first module whose adapter is of another kind than LoRA, DoRA or a module trained whole.
    """
    for tensor, value in list(_list_changes(adapted, scale)):
        tensor.copy_(value)


@contextmanager
def scaled_adapter(adapted: Any, scale: float) -> Iterator[None]:
    """Within the block, `scale_adapter`; then the adapter is bit for bit as before. Memory: a copy of what changes."""
    before = [(tensor, tensor.detach().clone()) for tensor, _ in _list_changes(adapted, scale)]
    try:
        scale_adapter(adapted, scale)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def _list_changes(adapted: Any, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of the adapter that changes, once where modules share it, and its new value."""
    seen: set[int] = set()
    for path, layer in adapter_layers(adapted) if scale != 1 else ():
        for tensor, value in _scale_layer(path, layer, scale):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield tensor, value


def adapter_layers(adapted: Any) -> list[tuple[str, Any]]:
    """PEFT's wrappers of the adapted modules and parameters of experts, with their paths in the plain model."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = [
        (path, m)
        for path, m in adapted.get_base_model().named_modules(remove_duplicate=False)
        if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    # The wrapper of a module with rows of new tokens has a layer of PEFT's inside.
    return [(adapted_path(path, m), m) for path, m in found if not isinstance(m, TrainableTokensLayer)]


def base_module(layer: Any) -> Any:
    """The base's own module under PEFT's wrapper."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module


def _scale_layer(path: str, layer: Any, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    (name,) = layer.active_adapters
    if isinstance(layer, TrainableTokensWrapper):
        rows = layer.token_adapter
        trained = rows.trainable_tokens_delta[name]
        yield trained, torch.lerp(rows.trainable_tokens_original[name].to(trained.dtype), trained, scale)
    elif isinstance(layer, ModulesToSaveWrapper):
        own = dict(layer.original_module.named_parameters())
        for key, trained in layer.modules_to_save[name].named_parameters():
            yield trained, torch.lerp(own[key].to(trained.dtype), trained, scale)
    elif isinstance(layer, LoraLayer) and not layer.lora_variant:
        yield from ((tensor, scale * tensor) for tensor in _output_factors(layer, name))
    elif isinstance(layer, LoraLayer) and isinstance(layer.lora_variant.get(name), DoraLinearVariant):
        yield from _scale_dora(layer, name, scale)
    else:
        raise AdapterError(
            f"'{path}' carries a {type(layer).__name__} whose update cannot be scaled; only LoRA, DoRA and modules "
            "trained whole can. Use it as trained."
        )


def factors_of(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A and B of a PEFT layer's adapter."""
    if name in layer.lora_embedding_B:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _output_factors(layer: Any, name: str) -> list[Tensor]:
    """B, with its bias and PiSSA's frozen half where there are any; each has the outputs as its first dimension."""
    if name in layer.lora_embedding_B:
        return [layer.lora_embedding_B[name]]
    return [*layer.lora_B[name].parameters(), *layer.lora_B[name].buffers()]


def _scale_dora(layer: Any, name: str, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    from peft.utils.integrations import dequantize_module_weight

    a, b = factors_of(layer, name)
    dora, weight = layer.lora_magnitude_vector[name], dequantize_module_weight(layer.get_base_layer()).to(a.dtype)
    update = b @ a  # (out, in)
    towards = scale * dora.weight / dora.get_weight_norm(weight, update, layer.scaling[name])  # (out,): e
    factor = 1 - scale + towards  # c
    factor = torch.where(factor.abs() < SMALLEST_ROW_FACTOR, SMALLEST_ROW_FACTOR, factor)
    rows = towards / factor
    norm = dora.get_weight_norm(weight, rows[:, None] * update, layer.scaling[name])
    yield dora.weight, factor * norm
    for tensor in _output_factors(layer, name):
        yield tensor, rows.view(-1, *[1] * (tensor.ndim - 1)) * tensor
