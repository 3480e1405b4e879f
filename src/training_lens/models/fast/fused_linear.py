"""Fused linear layers: layers of one input as one product, plain or with LoRA or DoRA, in training and in decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.kernels import lora_linear, row_norms, scale_outputs
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.native.decoding_kernels import FewRowsLinear, LoRABranches
from training_lens.models.fast.native.library import can_compute
from training_lens.models.fast.tolerance import is_close
from training_lens.models.sharding import is_sharded


@dataclass(frozen=True)
class LoRABranch:
    """A layer's adapter: A (rank, in), B (out, rank), their scaling, and DoRA's magnitude (out,)."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


class FusedLinear(nn.Module):
    """Linear layers of one input as one product: (*tokens, in) to their outputs side by side, (*tokens, sum of out).

    Of each layer y = g (x W^T + s (x A^T) B^T) + b, with DoRA's g = m / |W + s B A| (arXiv 2402.09353), else 1.

    The layers' weights lie in one tensor, one below the other; the layers keep their parameters, as parts of that
    tensor, and nothing is held twice. Weights in 4 bits stay as they are, and are dequantized in every pass, as
    bitsandbytes does. Adapters are read at every call, and get gradients.

    Args:
        layers: plain layers, or PEFT's with LoRA or DoRA.
        decodes: adapters are copied once, and prepared for decoding, on a CPU the weights, too. Where oneDNN computes
            bfloat16, the copy is reordered for its kernels, which plain weights would be at every call. Where few rows
            are computed from the plain weights, these stay, too.

    Raises:
        UnknownLayerError: the layers cannot be fused.
    """

    def __init__(self, layers: Sequence[Any], decodes: bool = False) -> None:
        super().__init__()
        if reason := _fusion_refusal(layers, decodes):
            raise UnknownLayerError(reason)
        self._bases = [_base_layer(layer) for layer in layers]
        self.sizes = tuple(_weight_shape(base)[0] for base in self._bases)
        self.input_width = _weight_shape(self._bases[0])[1]
        self.layers, self.decodes = tuple(layers), decodes
        self._is_formed = any(_is_4bit(base) or is_sharded(base) for base in self._bases)  # anew in each pass
        self._held_bias = None if self._is_formed else _concatenate_biases(self._bases)
        self._weight: Any = None  # of several layers, and what decoding prepares
        if decodes:
            self.layer_ids = tuple(map(id, layers))  # which layers of a model it was built of
            self._prepare_decoding(layers, [_weight_matrix(base) for base in self._bases])
            self.layers, self._bases = (), []  # what is not read any more is not kept
        elif len(layers) > 1 and not self._is_formed:
            self._weight = self._share_weights([_weight_matrix(base) for base in self._bases])
        self._addresses = [] if self._is_formed else [base.weight.data_ptr() for base in self._bases]

    @property
    def bias(self) -> Tensor | None:
        """(sum of out,); None where no layer has one."""
        return _concatenate_biases(self._bases) if self._is_formed else self._held_bias

    @property
    def weight(self) -> Any:
        """(sum of out, in), in decoding as it is prepared; None where it is formed anew in each pass."""
        if self._weight is None and not self._is_formed:
            return _weight_matrix(self._bases[0]).detach()  # which decoding may have moved beside others
        return self._weight

    @property
    def is_ready(self) -> bool:
        """Whether the layers still hold the fused weights, and each has at most one active adapter, unmerged."""
        is_held = len(self._bases) > 1 and not self._is_formed
        is_moved = is_held and [base.weight.data_ptr() for base in self._bases] != self._addresses
        return not is_moved and not any(_has_mixed_adapters(layer) for layer in self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, in training in the dtype of the computation: autocast's, else the weights'."""
        if self.decodes:
            return self._decode(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_dtype(self._bases[0])
        held = self.weight
        weight = partial(self._form_weight, dtype) if held is None else held.to(dtype)
        bias = self.bias
        bias = None if bias is None else bias.to(dtype)
        branches = [active_branch(layer) for layer in self.layers]
        x = x.to(dtype)
        with torch.autocast(device, enabled=False):
            if isinstance(weight, Tensor) and all(branch is None for branch in branches):
                return nn.functional.linear(x, weight, bias)
            return self._apply_adapters(x, weight, bias, self._fill_branches(branches, x))

    def _form_weight(self, dtype: torch.dtype) -> Tensor:
        """The layers' weights of now as one tensor of this dtype, those in 4 bits dequantized."""
        parts = [_dequantize(base) if _is_4bit(base) else _weight_matrix(base).detach() for base in self._bases]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)

    def _apply_adapters(
        self, x: Tensor, weight: Tensor | Callable[[], Tensor], bias: Tensor | None, branches: Sequence[LoRABranch]
    ) -> Tensor:
        factors, scales = [(b.down, b.up) for b in branches], [b.scale for b in branches]
        modules = [module for layer in self.layers for module in getattr(layer, "lora_dropout", {}).values()]
        dropouts = [m for m in modules if isinstance(m, nn.Dropout) and m.training and m.p]
        dropped = max(dropouts, key=lambda m: m.p)(x) if dropouts else None  # one mask for all that x goes into
        gains = self._dora_gains(branches)
        if gains is None:
            return lora_linear(x, weight, bias, factors, scales, dropped)
        if dropped is None:
            return scale_outputs(lora_linear(x, weight, None, factors, scales), gains, bias)
        # PEFT's DoRA scales the base's product of the inputs that dropout kept, and not that of the others.
        nothing = [(branch.down, branch.up) for branch in self._fill_branches([None] * len(branches), x)]
        rest = lora_linear(x - dropped, weight, bias, nothing, scales)
        return rest + scale_outputs(lora_linear(dropped, weight, None, factors, scales), gains)

    def _fill_branches(self, branches: Sequence[LoRABranch | None], x: Tensor) -> list[LoRABranch]:
        """The adapter of each layer; of rank 0 for one without."""
        empty = [LoRABranch(x.new_empty(0, self.input_width), x.new_empty(size, 0), 1.0) for size in self.sizes]
        return [branch or none for branch, none in zip(branches, empty, strict=True)]

    def _dora_gains(self, branches: Sequence[LoRABranch]) -> Tensor | None:
        """DoRA's scale of each output, m / |W + s B A|, 1 for layers without DoRA; None where no layer has it."""
        if all(branch.magnitude is None for branch in branches):
            return None
        dense = self._form_weight(weight_dtype(self._bases[0])) if self.weight is None else self.weight
        gains = [
            dense.new_ones(len(part), dtype=torch.float32)
            if branch.magnitude is None
            else branch.magnitude / row_norms(part, branch.down, branch.up, branch.scale)
            for part, branch in zip(dense.split(self.sizes), branches, strict=True)
        ]
        return torch.cat(gains)

    def _share_weights(self, weights: Sequence[Tensor]) -> Tensor:
        if len(weights) == 1:
            return weights[0].detach()
        if _lie_together(weights):
            return weights[0].detach().as_strided((sum(self.sizes), self.input_width), (self.input_width, 1))
        with torch.inference_mode(False):  # training may go on with these
            fused = torch.cat([weight.detach() for weight in weights])
        for base, part in zip(self._bases, fused.split(self.sizes), strict=True):
            base.weight.data = part if isinstance(base, nn.Linear) else part.T
        return fused

    @torch.no_grad()
    def _prepare_decoding(self, layers: Sequence[Any], weights: Sequence[Tensor]) -> None:
        branches = [active_branch(layer) for layer in layers]
        is_on_cpu = weights[0].device.type == "cpu"
        self._weight = torch.cat(list(weights)) if is_on_cpu else self._share_weights(weights)
        self.gains = self._dora_gains(self._fill_branches(branches, self.weight))
        self._product_bias = self.bias if self.gains is None else None  # DoRA's factor does not scale a bias
        plain = [weight.detach() for weight in weights]
        can_multiply = FewRowsLinear.can_compute(plain, self._product_bias)
        self.few = FewRowsLinear(plain, self._product_bias) if can_multiply else None
        self.has_adapter = any(branch is not None for branch in branches)
        self._branches: LoRABranches | None = None
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        if self.has_adapter:
            self._copy_adapters(branches, plain[0])
        self._is_packed = (
            is_on_cpu and self.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def _copy_adapters(self, branches: Sequence[LoRABranch | None], weight: Tensor) -> None:
        """`weight` is one of the layers', for its dtype and device."""
        factors = [(b.down, b.scale * b.up.float()) for b in self._fill_branches(branches, weight)]
        if can_compute(weight):
            self._branches = LoRABranches(factors, weight.dtype)
        else:
            self._down = torch.cat([down for down, _ in factors]).float()
            self._up = torch.block_diag(*(up for _, up in factors))

    def _decode(self, x: Tensor) -> Tensor:
        are_few = 0 < x.numel() <= FewRowsLinear.MOST * self.input_width
        out = self.few(x) if self.few and are_few else self.apply_to_many_rows(x)
        if self._branches and x.numel():
            self._branches.add_to(x.flatten(0, -2), out.flatten(0, -2))
        elif self._down is not None and self._up is not None:  # in float32 until the sum is rounded, as PEFT computes
            low = nn.functional.linear(x.float(), self._down)  # (*tokens, sum of ranks)
            out = (out + nn.functional.linear(low, self._up)).to(out.dtype)
        if self.gains is None:
            return out
        scaled = out * self.gains
        return (scaled if self.bias is None else scaled + self.bias).to(out.dtype)

    def apply_to_many_rows(self, x: Tensor) -> Tensor:
        """Decoding's x W^T + b as it is computed for many rows."""
        if self._is_packed:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self._product_bias, "none", [], "")
            return packed
        return nn.functional.linear(x, self.weight, self._product_bias)

    def gives_same_for_few_rows(self) -> bool:
        """Whether few rows, which have a kernel of their own in decoding, give what many rows do."""
        if self.few is None:
            return True
        x = torch.linspace(-2, 3, self.input_width, dtype=self.weight.dtype)[None]
        return is_close(self.apply_to_many_rows(x), self.few(x))


def _lie_together(weights: Sequence[Tensor]) -> bool:
    """Whether these (out, in) weights lie in one memory, one below the other, as training has put them."""
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    is_plain = all(weight.is_contiguous() for weight in weights) and len(storages) == 1
    return is_plain and [weight.data_ptr() for weight in weights[1:]] == ends[:-1]


def _concatenate_biases(bases: Sequence[Any]) -> Tensor | None:
    """The biases side by side, 0 for a layer without one; None where no layer has one."""
    if all(base.bias is None for base in bases):
        return None
    biases: list[Tensor] = [
        torch.zeros(_weight_shape(base)[0], dtype=weight_dtype(base), device=base.weight.device)
        if base.bias is None
        else base.bias.detach()
        for base in bases
    ]
    return biases[0] if len(biases) == 1 else torch.cat(biases)


def _fusion_refusal(layers: Sequence[Any], decodes: bool) -> str:
    """Why these layers cannot be fused; empty where they can."""
    for layer in layers:
        if reason := layer_refusal(layer, decodes):
            return reason
        if decodes and _has_mixed_adapters(layer):
            return "several adapters at once, or a merged one"
    bases = [_base_layer(layer) for layer in layers]
    if decodes and any(map(is_sharded, bases)):
        return "base weights that are shared out over processes"
    if not decodes and any(p.requires_grad for base in bases for p in base.parameters()):
        return "base weights that train"
    return "weights of several dtypes or devices" if len({(b.weight.dtype, b.weight.device) for b in bases}) > 1 else ""


def _base_layer(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _quant_state(base: Any) -> Any:
    """Of weights in 4 bits; None for others. A sharded weight is another tensor, whose layer keeps the state."""
    state = getattr(base.weight, "quant_state", None)
    return getattr(base, "quant_state", None) if state is None else state


def _is_4bit(base: Any) -> bool:
    return _quant_state(base) is not None


def _dequantize(base: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(base.weight.data, _quant_state(base))
    return weight


def weight_dtype(layer: Any) -> torch.dtype:
    """The dtype of a linear layer's weights; of those in 4 bits, that which they are computed in."""
    dtype: torch.dtype = layer.weight.dtype
    return (layer.compute_dtype or _quant_state(layer).dtype) if _is_4bit(layer) else dtype


def _weight_shape(base: Any) -> tuple[int, int]:
    """(out, in)."""
    out, width = _quant_state(base).shape if _is_4bit(base) else _weight_matrix(base).shape
    return out, width


def _weight_matrix(base: Any) -> Tensor:
    """The weight as (out, in); Conv1D keeps it as (in, out)."""
    weight: Tensor = base.weight
    return weight if isinstance(base, nn.Linear) else weight.T


def layer_refusal(layer: Any, decodes: bool) -> str:
    """Why a layer's formula is not known; empty where it is."""
    from peft.tuners import lora
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

    base = _base_layer(layer)
    is_quantized = type(base).__name__ == "Linear4bit" and _is_4bit(base)
    if is_quantized and decodes:
        return "base weights in 4 bits"
    if not is_quantized and type(base) is not nn.Linear and not isinstance(base, Conv1D):
        return f"a base of type {type(base).__name__}"
    if layer is base:
        return ""
    if type(layer) is not (getattr(lora, "Linear4bit", None) if is_quantized else lora.Linear):
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


def active_branch(layer: Any) -> LoRABranch | None:
    """The active adapter; None without one."""
    if layer is _base_layer(layer) or layer.disable_adapters:
        return None
    active = next((name for name in layer.active_adapters if name in layer.lora_A), None)
    if active is None:
        return None
    magnitude = layer.lora_magnitude_vector[active].weight if active in layer.lora_magnitude_vector else None
    return LoRABranch(layer.lora_A[active].weight, layer.lora_B[active].weight, float(layer.scaling[active]), magnitude)
