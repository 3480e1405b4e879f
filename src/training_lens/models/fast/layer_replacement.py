"""Which layers of a model can be computed faster: found by structure, and replaced only where the result is the same.

A first pass over a prompt records what every such layer is given and gives. Its replacement is fed the same, and
stands in only where it says the same up to rounding; every other layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.decoding_layers import (
    DecodingAttention,
    DecodingHeads,
    DecodingLinear,
    DecodingMLP,
    DecodingNorm,
    LinearWeights,
)

ROUNDING = {
    torch.float32: 1e-5,
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}  # root mean square, over that of the result
NORM_EPS = ("variance_epsilon", "eps")
QKV, GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer."""

    given: tuple[Any, ...]
    options: dict[str, Any]
    result: Any


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    difference = (found.float() - wanted.float()).square().mean().sqrt()
    return float(difference / wanted.float().square().mean().sqrt().clamp_min(1e-30))


def is_close(found: Tensor, wanted: Tensor, slack: float = 1.0) -> bool:
    """Whether the two differ by no more than the rounding of their number type, `slack` times."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return relative_error(found, wanted) <= slack * ROUNDING.get(wanted.dtype, 0.0)


def replace_layers(model: Any, ids: Tensor) -> int:
    """Put faster layers into `model`, in place; how many of its layers were replaced.

    Costs one pass over `ids`, and each replaced layer once more.

    Args:
        model: a copy of its own modules, with adapters merged or not; it is asked without gradients.
        ids: (1, tokens) int64, real ones.
    """
    makers = {name: make for name, module in model.named_modules() if (make := _maker(model, name, module))}
    with _record_calls(model, makers) as seen:
        model(input_ids=ids, use_cache=False)
    return sum(_replace_layer(model, name, make, seen.get(name)) for name, make in makers.items())


Maker = Callable[[], nn.Module]


def _maker(model: Any, name: str, module: nn.Module) -> Maker | None:
    """How to make the module's replacement; None where its structure is not known."""
    children = {child for child, _ in module.named_children()}
    if type(module).__name__.endswith("RMSNorm") and name.rpartition(".")[2] not in ("q_norm", "k_norm"):
        return lambda: _norm(module)
    if set(QKV) <= children <= {*QKV, "q_norm", "k_norm"} and not list(module.parameters(recurse=False)):
        return lambda: _attention(module)
    if set(GATED) <= children <= {*GATED, "act_fn"}:
        return lambda: _gated(module)
    if module is model.get_output_embeddings() and linear_of(module):
        return lambda: DecodingLinear([_linear(module)])
    return None


@contextmanager
def _record_calls(model: Any, makers: dict[str, Maker]) -> Iterator[dict[str, LayerCall]]:
    """Within the block the calls of these modules are noted."""
    seen: dict[str, LayerCall] = {}
    handles = []
    for name in makers:

        def note(_module: Any, given: Any, options: Any, result: Any, name: str = name) -> None:
            seen[name] = LayerCall(given, options, result)

        handles.append(model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _replace_layer(model: Any, name: str, make: Maker, seen: LayerCall | None) -> bool:
    """Replace one module where that says the same."""
    if seen is None:
        return False
    try:
        layer = make()
        found = layer(*seen.given, **seen.options)
        either_way = all(_is_same_for_few_rows(part) for part in layer.modules() if isinstance(part, DecodingLinear))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False  # it looks like what we know, and is something else
    found, wanted = (x[0] if isinstance(x, tuple) else x for x in (found, seen.result))
    if not (either_way and is_close(found, wanted)):
        return False
    model.set_submodule(name, layer)
    return True


def _is_same_for_few_rows(product: DecodingLinear) -> bool:
    """Whether many rows, of which a probe may have too few, are computed as few are."""
    if product.few is None:
        return True
    x = torch.linspace(-2, 3, product.width, dtype=product.weight.dtype)[None]
    return is_close(product.apply_to_many_rows(x), product.few(x))


def _norm(module: Any) -> DecodingNorm:
    eps = next(getattr(module, name) for name in NORM_EPS if hasattr(module, name))
    # Gemma's norms keep their weight less 1; at a random vector the two kinds cannot be mistaken.
    x = torch.linspace(-2, 3, module.weight.numel(), device=module.weight.device).to(module.weight.dtype)[None]
    for weight in (module.weight, 1 + module.weight):
        if is_close(DecodingNorm(weight, eps)(x), module(x)):
            return DecodingNorm(weight, eps)
    raise ValueError("another kind of norm")


def _attention(module: Any) -> DecodingAttention:
    q, k = _linear(module.q_proj), _linear(module.k_proj)
    size = module.head_dim
    cap = getattr(module, "attn_logit_softcapping", None)
    heads = DecodingHeads(len(q.weight) // size, len(k.weight) // size, size, module.scaling, cap)
    norms = (module.q_norm, module.k_norm) if hasattr(module, "q_norm") else None
    qkv = DecodingLinear([q, k, _linear(module.v_proj)])
    return DecodingAttention(qkv, DecodingLinear([_linear(module.o_proj)]), heads, norms, module.layer_idx)


def _gated(module: Any) -> DecodingMLP:
    gate_up = DecodingLinear([_linear(module.gate_proj), _linear(module.up_proj)])
    return DecodingMLP(gate_up, DecodingLinear([_linear(module.down_proj)]), module.act_fn)


def _linear(module: nn.Module) -> LinearWeights:
    found = linear_of(module)
    if found is None:
        raise ValueError(f"{type(module).__name__} is no plain linear layer")
    return found


def linear_of(module: Any) -> LinearWeights | None:
    """The layer's weights; with an adapter beside them where it is LoRA's. None for any other kind of layer."""
    from peft.tuners.lora import Linear as LoraLinear

    if type(module) is nn.Linear:
        return LinearWeights(module.weight, module.bias)
    if not isinstance(module, LoraLinear) or type(module.base_layer) is not nn.Linear or module.lora_variant:
        return None
    base = module.base_layer
    if module.disable_adapters or module.merged:
        return None
    (name,) = module.active_adapters
    up = module.scaling[name] * module.lora_B[name].weight.float()
    return None if module.lora_bias[name] else LinearWeights(base.weight, base.bias, module.lora_A[name].weight, up)
