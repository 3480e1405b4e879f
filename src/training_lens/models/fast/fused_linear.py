"""Fused linear layers: layers of one input as one product, plain or with LoRA or DoRA, in training and in decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.kernels import lora_linear, row_norms, scale_outputs
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.native.decoding_kernels import FewRowsLinear, LoRABranches
from training_lens.models.fast.native.library import can_compute


@dataclass(frozen=True)
class LoRABranch:
    """A layer's adapter: A (rank, in), B (out, rank), their scaling, and DoRA's magnitude (out,)."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


class FusedLinear:
    """Linear layers of one input in training: adapters get gradients, and their outputs lie side by side.

    Their weights lie in one tensor, one below the other. The layers keep their parameters, as parts of that tensor;
    nothing is held twice.

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
        """Why these layers cannot be fused; empty where they can."""
        for layer in layers:
            if reason := _refuse_layer(layer):
                return reason
            if _base_layer(layer).weight.requires_grad:
                return "base weights that train"
        weights = [_base_layer(layer).weight for layer in layers]
        if len({(w.dtype, w.device) for w in weights}) > 1:
            return "weights of several dtypes or devices"
        if len({_base_layer(layer).bias is None for layer in layers}) > 1:
            return "biases at some projections of an input alone"
        return ""

    @property
    def input_width(self) -> int:
        """Numbers of a token that goes in."""
        return self._weight.shape[1]

    @property
    def is_ready(self) -> bool:
        """Whether the layers still hold the fused weights, and each has at most one active adapter, unmerged."""
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
        # PEFT's DoRA scales the base's product of the inputs that dropout kept, and not that of the others.
        rest = nn.functional.linear(x - dropped, weight, bias)
        return rest + scale_outputs(lora_linear(dropped, weight, None, factors, scales), gains)

    def _dora_scales(self, branches: Sequence[LoRABranch]) -> Tensor | None:
        """DoRA's scale of each output, m / |W + s B A|, 1 for layers without DoRA; None where no layer has it."""
        if all(branch.magnitude is None for branch in branches):
            return None
        parts = zip(self._weight.split(self.sizes), branches, strict=True)
        return torch.cat([_dora_scale(weight, branch) for weight, branch in parts])

    @staticmethod
    def _empty_branch(size: int, x: Tensor) -> LoRABranch:
        """An adapter of rank 0, for a layer without one."""
        return LoRABranch(x.new_empty(0, x.shape[-1]), x.new_empty(size, 0), 1.0)

    def _fuse_weights(self) -> tuple[Tensor, Tensor | None]:
        if len(self._bases) == 1:
            return _weight_matrix(self._bases[0]).detach(), _detach_bias(self._bases[0].bias)
        weight = torch.cat([base.weight.detach() for base in self._bases])
        for base, part in zip(self._bases, weight.split(self.sizes), strict=True):
            base.weight.data = part
        biases = [base.bias for base in self._bases]
        return weight, None if biases[0] is None else torch.cat([bias.detach() for bias in biases])


@dataclass(frozen=True)
class LinearWeights:
    """A layer as decoding reads it: x W^T + b; with an adapter scale (x W^T + (x A^T) B^T) + b.

    Shapes: weight (out, in), bias (out,), down A (rank, in), up B (out, rank) times the adapter's scaling; DoRA's scale
    (out,).
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: Tensor | None = None


@torch.no_grad()
def read_linear(layer: Any) -> LinearWeights:
    """The weights of a linear layer, and of its active adapter.

    Raises:
        UnknownLayerError: see `FusedLinear.refusal`.
    """
    if reason := _refuse_layer(layer):
        raise UnknownLayerError(reason)
    if _has_mixed_adapters(layer):
        raise UnknownLayerError("several adapters at once, or a merged one")
    base, branch = _base_layer(layer), _active_branch(layer)
    weight = _weight_matrix(base)
    if branch is None:
        return LinearWeights(weight, base.bias)
    scale = None if branch.magnitude is None else _dora_scale(weight, branch)
    return LinearWeights(weight, base.bias, branch.down, branch.scale * branch.up.float(), scale)


class DecodingLinear(nn.Module):
    """Linear layers of one input in decoding: (..., in) to their outputs side by side, (..., sum of outs).

    Cost: a copy of the weights. Where oneDNN computes bfloat16, the copy is reordered once for its kernels, which
    plain weights would be at every call. Where few rows are computed from the plain weights, these stay, too.
    """

    def __init__(self, parts: Sequence[LinearWeights]) -> None:
        super().__init__()
        weight = torch.cat([part.weight for part in parts])
        self.width, self.packed = weight.shape[1], _is_packable(weight)
        self.weight = _reorder_weight(weight) if self.packed else weight
        self.bias, self.scale, self.scaled_bias = _concatenate_biases(parts), _concatenate_scales(parts), None
        if self.scale is not None:
            self.bias, self.scaled_bias = None, self.bias  # DoRA's factor does not scale a bias
        plain = [part.weight.detach() for part in parts]
        self.few = FewRowsLinear(plain, self.bias) if FewRowsLinear.can_compute(plain, self.bias) else None
        self.down, self.up, self._branches = None, None, None
        if any(part.down is not None for part in parts):
            factors = _adapter_factors(parts)
            if can_compute(weight):
                self._branches = LoRABranches(factors, weight.dtype)
            else:
                self.down = torch.cat([down for down, _ in factors]).float()
                self.up = torch.block_diag(*(up for _, up in factors)).float()

    @property
    def has_adapter(self) -> bool:
        """Whether one is computed beside the weights."""
        return self._branches is not None or self.down is not None

    def forward(self, x: Tensor) -> Tensor:
        are_few = 0 < x.numel() <= FewRowsLinear.MOST * self.width
        out = self.few(x) if self.few and are_few else self.apply_to_many_rows(x)
        if self._branches and x.numel():
            self._branches.add_to(x.flatten(0, -2), out.flatten(0, -2))
        elif self.down is not None and self.up is not None:  # in float32 until the sum is rounded, as PEFT computes
            low = nn.functional.linear(x.float(), self.down)  # (..., sum of ranks)
            out = (out + nn.functional.linear(low, self.up)).to(out.dtype)
        if self.scale is None:
            return out
        scaled = out * self.scale
        return (scaled if self.scaled_bias is None else scaled + self.scaled_bias).to(out.dtype)

    def apply_to_many_rows(self, x: Tensor) -> Tensor:
        """x W^T + b as it is computed for many rows."""
        if self.packed:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        return nn.functional.linear(x, self.weight, self.bias)


def _adapter_factors(parts: Sequence[LinearWeights]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each, without ranks where it has no adapter."""
    nothing = [
        (part.weight.new_zeros(0, part.weight.shape[1]), part.weight.new_zeros(len(part.weight), 0)) for part in parts
    ]
    return [
        none if part.down is None or part.up is None else (part.down, part.up)
        for part, none in zip(parts, nothing, strict=True)
    ]


def _concatenate_scales(parts: Sequence[LinearWeights]) -> Tensor | None:
    if all(part.scale is None for part in parts):
        return None
    ones = (torch.ones(len(part.weight), device=part.weight.device) for part in parts)
    return torch.cat([one if part.scale is None else part.scale for part, one in zip(parts, ones, strict=True)])


def _is_packable(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _reorder_weight(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _concatenate_biases(parts: Sequence[LinearWeights]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts])


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
    """Why a layer's formula is not known; empty where it is."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

    base = _base_layer(layer)
    if type(base) is not nn.Linear and not isinstance(base, Conv1D):
        return f"a base of type {type(base).__name__}"
    if not base.weight.is_floating_point():
        return "base weights that are quantized"
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
    """Whether several adapters are active at once, or one is merged into the base weights."""
    if layer is _base_layer(layer) or layer.disable_adapters:
        return False
    return bool(layer.merged) or len([a for a in layer.active_adapters if a in layer.lora_A]) > 1


def _active_branch(layer: Any) -> LoRABranch | None:
    """The active adapter; None without one."""
    if layer is _base_layer(layer) or layer.disable_adapters:
        return None
    active = next((name for name in layer.active_adapters if name in layer.lora_A), None)
    if active is None:
        return None
    magnitude = layer.lora_magnitude_vector[active].weight if active in layer.lora_magnitude_vector else None
    return LoRABranch(layer.lora_A[active].weight, layer.lora_B[active].weight, float(layer.scaling[active]), magnitude)


def _dropout_rate(layers: Sequence[Any]) -> float:
    """The adapters' dropout rate now, 0 in evaluation; one mask serves all projections of an input."""
    shares = [
        module.p
        for layer in layers
        for module in getattr(layer, "lora_dropout", {}).values()
        if isinstance(module, nn.Dropout) and module.training
    ]
    return max(shares, default=0.0)
