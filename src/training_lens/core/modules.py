"""The adapted modules of a PEFT model, found by their type and not by their name; those of one shape as one batch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from training_lens.core.types import ModuleRecord
from training_lens.errors import LensError
from training_lens.measures.factors import Factors
from training_lens.models import pissa
from training_lens.models.experts import adapted_path, expert_name, is_expert_adapter, split_a, split_b
from training_lens.models.sharding import gathered, is_sharded
from training_lens.utils.devices import move_to_device, move_to_one_device
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")
WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module)\.)*(?:base_model\.model\.)?(?:_orig_mod\.)?")
OF_EXPERT = "expert_"  # begins the type of an expert
KINDS = {"out_proj": "o"} | {f"{kind}_proj": kind for kind in ("q", "k", "v", "o", "gate", "up", "down")}


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """One adapted module, or one expert of a parameter that holds several: its trained and its frozen parameters.

    `a` (rank, in) and `b` (out, rank) are the trained parameters, `magnitude` (out,) DoRA's. `frozen_a` and `frozen_b`
    are the other halves of PiSSA's factors, so that dW = scaling [b, frozen_b] [a; frozen_a]. Of an expert, `a` and `b`
    hold the factors of all `experts` of its parameter; `factors` gives its own.
    """

    record: ModuleRecord
    module: torch.nn.Module
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    frozen_a: Tensor | None = None
    frozen_b: Tensor | None = None
    magnitude: torch.nn.Parameter | None = None
    expert: int | None = None
    experts: int = 1

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def trained_parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """A, B and DoRA's magnitude."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def trained_factors(self) -> tuple[Tensor, Tensor]:
        """The trained A (rank, in) and B (out, rank), not copied: what is written to them is written to the adapter."""
        a, b = self.a.detach(), self.b.detach()
        if self.expert is None:
            return a, b
        return split_a(a, self.experts)[self.expert], split_b(b, self.experts)[self.expert]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of dW = scaling B A, with PiSSA's frozen halves; not copied for other adapters."""
        a, b = self.trained_factors()
        if self.frozen_a is None or self.frozen_b is None:
            return a, b
        return pissa.concatenate_halves(a, self.frozen_a, 0), pissa.concatenate_halves(b, self.frozen_b, 1)

    def base_weight(self) -> Tensor | None:
        """W as (out, in), in float32 and dequantized. Do not write to it.

        None if the module has no single matrix, or 4-bit codes that bitsandbytes packed for inference on the CPU.
        """
        with gathered(self.module):
            weight = self._read_base_weight()
            return weight.clone() if weight is not None and is_sharded(self.module) else weight

    def _read_base_weight(self) -> Tensor | None:
        from peft.utils.integrations import dequantize_module_weight

        base: Any = self.module.get_base_layer()  # type: ignore[operator]
        if self.expert is not None:
            expert: Tensor = self.module.get_param()[self.expert].detach().float()  # type: ignore[operator]
            return expert.T if getattr(base, "is_transposed", False) else expert
        weight = getattr(base, "weight", None)
        packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
        if packed or not isinstance(weight, Tensor):
            return None
        weight = dequantize_module_weight(base).detach().float()
        if isinstance(base, torch.nn.Embedding) or getattr(self.module, "fan_in_fan_out", False):
            weight = weight.T  # embeddings and Conv1D store it as (in, out)
        shape = (self.record.out_features, self.record.in_features)
        return weight if weight.shape == shape else None


def adapter_modules(model: Any) -> tuple[AdapterModule, ...]:
    """All modules that a LoRA adapts, in the model's order; tied or shared ones once.

    If only some adapters train, all modules of those adapters, frozen ones included.

    Raises:
        LensError: there is none: a model without PEFT, another kind of adapter, or a full fine-tune.
    """
    from peft.tuners.lora import LoraLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    first: dict[
        tuple[int, int | None], AdapterModule
    ] = {}  # by A, which shared layers and tied adapters have in common
    for name, layer in layers:
        for module in _layer_adapters(adapted_path(strip_wrappers(name), layer), layer):
            first.setdefault((id(module.a), module.expert), module)
    found = list(first.values())
    training = {m.record.adapter for m in found if any(p.requires_grad for p in m.trained_parameters)}
    if not found:
        raise LensError(_describe_missing_adapter(model, len(layers)))
    chosen = [m for m in found if m.record.adapter in training] or found
    if len({m.record.adapter for m in chosen}) > 1:
        chosen = [replace(m, record=replace(m.record, name=f"{m.name}#{m.record.adapter}")) for m in chosen]
    return tuple(chosen)


def is_identity_adapter(model: Any) -> bool:
    """Whether a PEFT model computes exactly what its base does, as with a fresh LoRA: A or B is zero in every pair.

    False where the factors alone do not show it: DoRA, whose rows are scaled by m / |W|, saved modules, and other
    kinds of adapters. Cost: waits for the device once for each module, up to the first that adds something.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapting = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return all(isinstance(layer, LoraLayer) and _is_identity_layer(layer) for layer in adapting)


def _is_identity_layer(layer: Any) -> bool:
    linear = [(down.weight, up.weight) for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True)]
    embeddings = zip(layer.lora_embedding_A.values(), layer.lora_embedding_B.values(), strict=True)
    biases = [bias for up in layer.lora_B.values() if (bias := getattr(up, "bias", None)) is not None]
    zero = all(not b.any() or not a.any() for a, b in (*linear, *embeddings)) and not any(bias.any() for bias in biases)
    return zero and not layer.lora_magnitude_vector


def _describe_missing_adapter(model: Any, layers: int) -> str:
    trained = sum(p.requires_grad for p in model.parameters())
    kind = type(model).__name__
    if layers:
        return f"the lens found {layers} adapted modules in this {kind}, but none is a linear layer or an embedding."
    reason = f"it trains {trained} parameters of its own (a full fine-tune?)" if trained else "nothing in it trains"
    return (
        f"the lens found no LoRA module in this {kind}: {reason}. It captures LoRA and DoRA adapters of PEFT: give the "
        "model that get_peft_model or PeftModel.from_pretrained returned, or switch the lens off (lens.enabled=false)."
    )


def _layer_adapters(name: str, layer: Any) -> Iterator[AdapterModule]:
    """One module for each adapter on a layer, and for each of its experts."""
    for adapter, down in layer.lora_A.items():
        up = layer.lora_B[adapter]
        if is_expert_adapter(layer):
            yield from _expert_adapters(name, layer, adapter)
        elif not isinstance(down, torch.nn.Linear):
            logger.info("the lens does not capture %s: its adapter is not a pair of matrices", name)
        elif parametrize.is_parametrized(down, "weight"):
            (a, frozen_a), (b, frozen_b) = pissa.split_halves(down), pissa.split_halves(up)
            yield _build_module(name, layer, adapter, a, b, frozen_a, frozen_b)
        else:
            yield _build_module(name, layer, adapter, down.weight, up.weight)
    for adapter, a in layer.lora_embedding_A.items():
        yield _build_module(name, layer, adapter, a, layer.lora_embedding_B[adapter])


def _expert_adapters(name: str, layer: Any, adapter: str) -> Iterator[AdapterModule]:
    a, b, experts = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.num_experts
    shapes = split_a(a, experts).shape[1:], split_b(b, experts).shape[1:]
    for expert in range(experts):
        record = module_record(expert_name(name, expert), *shapes, float(layer.scaling[adapter]), "lora", adapter)
        yield AdapterModule(record, layer, a, b, expert=expert, experts=experts)


def _build_module(
    name: str, layer: Any, adapter: str, a: Any, b: Any, frozen_a: Tensor | None = None, frozen_b: Tensor | None = None
) -> AdapterModule:
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    magnitude = magnitudes[adapter].weight if adapter in magnitudes else None
    variant = "pissa" if frozen_a is not None else "lora" if magnitude is None else "dora"
    record = module_record(name, a.shape, b.shape, float(layer.scaling[adapter]), variant, adapter)
    return AdapterModule(record, layer, a, b, frozen_a, frozen_b, magnitude)


def module_record(
    name: str,
    a_shape: Sequence[int],
    b_shape: Sequence[int],
    scaling: float,
    variant: str = "lora",
    adapter: str = "default",
) -> ModuleRecord:
    """The record of an adapted module; its layer and kind are read from its name.

    Args:
        name: its path in the base model.
        a_shape, b_shape: (rank, in) and (out, rank).
    """
    layer, kind = layer_and_kind(name)
    return ModuleRecord(
        name=name,
        layer=layer,
        kind=kind,
        rank=a_shape[0],
        in_features=a_shape[1],
        out_features=b_shape[0],
        scaling=scaling,
        variant=variant,
        adapter=adapter,
    )


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """The number of the decoder layer that a module is in, None outside of them, and its type: `q`, `down`, `lm_head`.

    Example:
        >>> layer_and_kind("model.layers.3.self_attn.q_proj"), layer_and_kind("lm_head")
        ((3, 'q'), (None, 'lm_head'))
        >>> layer_and_kind("model.layers.3.mlp.experts.down_proj[7]")
        (3, 'expert_down')
    """
    layer, (last, bracket, _) = LAYER.search(name), name.rsplit(".", 1)[-1].partition("[")
    kind = f"{OF_EXPERT}{last.removesuffix('_proj')}" if bracket else KINDS.get(last, last)
    return int(layer[1]) if layer else None, kind


def strip_wrappers(name: str) -> str:
    """The path in the base model, without the prefixes of torch.compile, DistributedDataParallel and PEFT."""
    return WRAPPERS.sub("", name)


GradientGetter = Callable[[torch.nn.Parameter], Tensor | None]


@dataclass(frozen=True)
class ModuleBatch:
    """Modules of one shape, scaling and device, with their positions in the model's order."""

    positions: tuple[int, ...]
    modules: tuple[AdapterModule, ...]
    scaling: float

    def copy_weights(self) -> Factors:
        """The trained factors, copied."""
        return self._copy_factors(lambda parameter: parameter)

    def copy_gradients(self, gradient_of: GradientGetter) -> Factors:
        """The factors' gradients, copied; zeros where a parameter has none."""

        def copy_gradient(parameter: torch.nn.Parameter) -> Tensor:
            gradient = gradient_of(parameter)
            return torch.zeros_like(parameter) if gradient is None else gradient

        return self._copy_factors(copy_gradient)

    def _copy_factors(self, tensor_of: Callable[[torch.nn.Parameter], Tensor]) -> Factors:
        magnitudes = [tensor_of(m.magnitude) for m in self.modules if m.magnitude is not None]
        (a, b), experts = self.parameters(), self.modules[0].experts
        return Factors(
            stack_experts((tensor_of(p) for p in a), experts, split_a),
            stack_experts((tensor_of(p) for p in b), experts, split_b),
            stack_float32(magnitudes) if magnitudes else None,
        )

    def parameters(self) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """The A and the B of all modules, in order; those that experts share once."""
        first = self.modules[:: self.modules[0].experts]  # all experts of a parameter are here, one after the other
        return [m.a for m in first], [m.b for m in first]

    def full_factors(self, trained: Factors) -> Factors:
        """The factors of dW: those that train, and for PiSSA the frozen halves too."""
        if self.modules[0].frozen_a is None:
            return trained
        a = stack_float32(m.frozen_a for m in self.modules if m.frozen_a is not None)
        b = stack_float32(m.frozen_b for m in self.modules if m.frozen_b is not None)
        return Factors(torch.cat([trained.a, a], 1), torch.cat([trained.b, b], 2), trained.magnitude)


class ModuleBatches:
    """The modules in batches of one shape, and the way back to the model's order."""

    def __init__(self, modules: Sequence[AdapterModule]) -> None:
        positions_by_shape: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, m in enumerate(modules):
            parts = (m.frozen_a is None, m.magnitude is None)
            positions_by_shape[m.a.shape, m.b.shape, m.experts, m.record.scaling, parts, m.a.device].append(i)
        self._batches = [
            ModuleBatch(tuple(positions), tuple(modules[i] for i in positions), modules[positions[0]].record.scaling)
            for positions in positions_by_shape.values()
        ]
        self._order = torch.tensor([i for batch in self._batches for i in batch.positions]).argsort()

    def __iter__(self) -> Iterator[ModuleBatch]:
        return iter(self._batches)

    def restore_order(self, parts: Sequence[Tensor]) -> Tensor:
        """(modules,) in the model's order, from (modules of the batch,) for each batch. Does not synchronise."""
        values = torch.cat(move_to_one_device(parts))
        if self._order.device != values.device:
            self._order = move_to_device(self._order, values.device)
        return values[self._order]

    def restore_order_all(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`restore_order` for each measure; `parts` has those of each batch. NaN where a batch lacks a measure."""
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: self.restore_order([_measure_or_nan(part, name) for part in parts]) for name in names}


def _measure_or_nan(part: Mapping[str, Tensor], name: str) -> Tensor:
    return part[name] if name in part else torch.full_like(next(iter(part.values())), torch.nan)


def stack_float32(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of one shape as one float32 tensor with a leading dimension, detached."""
    return torch.stack([tensor.detach() for tensor in tensors]).float()


def stack_experts(tensors: Iterable[Tensor], experts: int, split: Callable[[Tensor, int], Tensor]) -> Tensor:
    """As `stack_float32`, with each tensor split into those of its experts, one after the other."""
    if experts == 1:
        return stack_float32(tensors)
    return torch.cat([split(tensor.detach(), experts) for tensor in tensors]).float()
