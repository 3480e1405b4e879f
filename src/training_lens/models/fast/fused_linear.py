"""Linear layers of one input as one product, with the adapters that they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.kernels import lora_linear, row_norms, scale_outputs


@dataclass(frozen=True)
class LoRABranch:
    """What an adapter adds to a layer: A (rank, in), B (out, rank), their scale, and the magnitude (out,) of DoRA."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


class FusedLinear:
    """Some linear layers, plain or with a LoRA or DoRA of PEFT's; their weights lie in one tensor, one below the other.

    The layers keep their parameters, as parts of that tensor; nothing is held twice.

    Args:
        layers: see `refusal`.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        self._bases = [_base_layer(layer) for layer in layers]
        self.sizes = tuple(_weight_matrix(base).shape[0] for base in self._bases)
        self._weight, self._bias = self._fuse_weights()

    @staticmethod
    def refusal(layers: Sequence[Any]) -> str:
        """Why these cannot be computed together; empty where they can."""
        for layer in layers:
            if reason := _refuse_layer(layer):
                return reason
        weights = [_base_layer(layer).weight for layer in layers]
        if len({(w.dtype, w.device) for w in weights}) > 1:
            return "weights of several dtypes or devices"
        if len({_base_layer(layer).bias is None for layer in layers}) > 1:
            return "biases at some projections of an input alone"
        return ""

    @property
    def is_ready(self) -> bool:
        """Whether the layers' weights are still those that were put together, and their adapters can be computed."""
        pointers = [_weight_matrix(base).data_ptr() for base in self._bases]
        starts = [part.data_ptr() for part in self._weight.split(self.sizes)]
        return pointers == starts and not any(_has_mixed_adapters(layer) for layer in self.layers)

    def __call__(self, x: Tensor) -> Tensor:
        """(*tokens, in) -> (*tokens, sum of out), in the dtype of the computation: autocast's, else the weights'."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._weight.dtype
        weight, bias = self._weight.to(dtype), None if self._bias is None else self._bias.to(dtype)
        branches = [_active_branch(layer) for layer in self.layers]
        x = x.to(dtype)
        with torch.autocast(device, enabled=False):
            if all(branch is None for branch in branches):
                return nn.functional.linear(x, weight, bias)
            known = [b or self._empty_branch(size, x) for b, size in zip(branches, self.sizes, strict=True)]
            return self._apply_adapters(x, weight, bias, known)

    def _apply_adapters(self, x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[LoRABranch]) -> Tensor:
        factors, scales = [(b.down, b.up) for b in branches], [b.scale for b in branches]
        dropout = _dropout_rate(self.layers)
        dropped = nn.functional.dropout(x, dropout) if dropout else None
        gains = self._dora_scales(branches)
        if gains is None:
            return lora_linear(x, weight, bias, factors, scales, dropped)
        if dropped is None:
            return scale_outputs(lora_linear(x, weight, None, factors, scales), gains, bias)
        # PEFT's DoRA multiplies what its branch saw by the gain, and leaves the rest of the base as it is.
        rest = nn.functional.linear(x - dropped, weight, bias)
        return rest + scale_outputs(lora_linear(dropped, weight, None, factors, scales), gains)

    def _dora_scales(self, branches: Sequence[LoRABranch]) -> Tensor | None:
        """DoRA's factor of each output, m / |W + s B A|, and 1 where a layer has none; None where no layer has one."""
        if all(branch.magnitude is None for branch in branches):
            return None
        parts = zip(self._weight.split(self.sizes), branches, strict=True)
        return torch.cat([_dora_scale(weight, branch) for weight, branch in parts])

    @staticmethod
    def _empty_branch(size: int, x: Tensor) -> LoRABranch:
        """The adapter of a layer that has none: of rank 0."""
        return LoRABranch(x.new_empty(0, x.shape[-1]), x.new_empty(size, 0), 1.0)

    def _fuse_weights(self) -> tuple[Tensor, Tensor | None]:
        if len(self._bases) == 1:
            return _weight_matrix(self._bases[0]).detach(), _detach_bias(self._bases[0].bias)
        weight = torch.cat([base.weight.detach() for base in self._bases])
        for base, part in zip(self._bases, weight.split(self.sizes), strict=True):
            base.weight.data = part
        biases = [base.bias for base in self._bases]
        return weight, None if biases[0] is None else torch.cat([bias.detach() for bias in biases])


def _dora_scale(weight: Tensor, branch: LoRABranch) -> Tensor:
    if branch.magnitude is None:
        return torch.ones(len(weight), device=weight.device)
    return branch.magnitude / row_norms(weight, branch.down, branch.up, branch.scale)


def _detach_bias(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _base_layer(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _weight_matrix(base: Any) -> Tensor:
    """The weight as (out, in); Conv1D keeps it as (in, out)."""
    weight: Tensor = base.weight
    return weight if isinstance(base, nn.Linear) else weight.T


def _refuse_layer(layer: Any) -> str:
    """Why a layer cannot be computed here; empty where it can."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

    base = _base_layer(layer)
    if type(base) is not nn.Linear and not isinstance(base, Conv1D):
        return f"a base of type {type(base).__name__}"
    if base.weight.requires_grad or not base.weight.is_floating_point():
        return "base weights that train or are quantized"
    if layer is base:
        return ""
    if type(layer) is not Linear:
        return f"adapters of type {type(layer).__name__}"
    for variant in layer.lora_variant.values():
        if type(variant) is not DoraLinearVariant:
            return f"adapters of type {type(variant).__name__}"
    if any(layer.lora_bias.values()):
        return "adapters with a bias"
    return ""


def _has_mixed_adapters(layer: Any) -> bool:
    """Whether several adapters work at once, or one is in the base weights already."""
    if layer is _base_layer(layer) or layer.disable_adapters:
        return False
    return bool(layer.merged) or len([a for a in layer.active_adapters if a in layer.lora_A]) > 1


def _active_branch(layer: Any) -> LoRABranch | None:
    """The adapter that works; None without one."""
    if layer is _base_layer(layer) or layer.disable_adapters:
        return None
    active = next((name for name in layer.active_adapters if name in layer.lora_A), None)
    if active is None:
        return None
    magnitude = layer.lora_magnitude_vector[active].weight if active in layer.lora_magnitude_vector else None
    return LoRABranch(layer.lora_A[active].weight, layer.lora_B[active].weight, float(layer.scaling[active]), magnitude)


def _dropout_rate(layers: Sequence[Any]) -> float:
    """The share of inputs that the adapters drop at this moment: of one input once, for all of its projections."""
    shares = [
        module.p
        for layer in layers
        for module in getattr(layer, "lora_dropout", {}).values()
        if isinstance(module, nn.Dropout) and module.training
    ]
    return max(shares, default=0.0)
