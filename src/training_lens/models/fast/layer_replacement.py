"""Puts decoding's layers in a model, where they give the same results.

A first pass over a prompt records what every recognized layer is given and gives. Its replacement is given the same,
and stands in only where its result is the same up to rounding; every other layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.decoding_layers import DecodingAttention, DecodingMLP, DecodingNorm
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.layer_spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    UnknownLayerError,
    activation_of,
)
from training_lens.models.fast.recognition import recognize_layers
from training_lens.models.fast.tolerance import is_close
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
Specs = dict[Any, LayerSpec]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer."""

    given: tuple[Any, ...]
    options: dict[str, Any]
    result: Any


def replace_layers(model: Any, ids: Tensor) -> int:
    """Put decoding's layers into `model`, in place; how many of its layers were replaced.

    Cost: a pass over `ids`, one of a few tokens, and each replaced layer once more.

    Args:
        model: a copy of its own modules, with adapters merged or not; it is called without gradients.
        ids: (1, tokens) int64, of a real prompt.
    """
    layers = recognize_layers(model)
    head = model.get_output_embeddings()
    known = {name for name, module in model.named_modules() if module in layers.specs or module is head}
    names = [name for name, _ in model.named_modules() if name in known and not known.intersection(_parents(name))]
    with _record_calls(model, names) as calls:
        model(input_ids=ids, use_cache=False)
    refusals = dict.fromkeys(layers.refusals.values())
    replaced = 0
    for name in names:
        if reason := _replace_layer(model, name, layers.specs, calls.get(name)):
            refusals[reason] = None
        else:
            replaced += 1
    if refusals:
        logger.debug("layers that decode by themselves: %s", "; ".join(refusals))
    return replaced


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


@contextmanager
def _record_calls(model: Any, names: Sequence[str]) -> Iterator[dict[str, LayerCall]]:
    """Within the block the calls of these modules are noted."""
    calls: dict[str, LayerCall] = {}
    handles = []
    for name in names:

        def note(_module: Any, given: Any, options: Any, result: Any, name: str = name) -> None:
            calls[name] = LayerCall(given, options, result)

        handles.append(model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _replace_layer(model: Any, name: str, specs: Specs, call: LayerCall | None) -> str:
    """Replace one module where the result is the same; else, why not."""
    module = model.get_submodule(name)
    kind = type(module).__name__
    if call is None:
        return f"{kind} is not called"
    try:
        layer = _build_layer(module, specs)
        found = layer(*call.given, **call.options)
        consistent = all(part.gives_same_for_few_rows() for part in layer.modules() if isinstance(part, FusedLinear))
    except UnknownLayerError as reason:
        return str(reason)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{kind} takes something else"
    found, expected = (x[0] if isinstance(x, tuple) else x for x in (found, call.result))
    if not (consistent and is_close(found, expected)):
        return f"{kind} computes something else"
    model.set_submodule(name, layer)
    return ""


def _build_layer(module: Any, specs: Specs) -> nn.Module:
    spec = specs.get(module)
    if isinstance(spec, NormSpec):
        return DecodingNorm(module.weight + 1 if spec.adds_one else module.weight, spec)
    if isinstance(spec, MLPSpec):
        gate_up = _fuse_projections(module, spec.gate_up)
        return DecodingMLP(gate_up, _fuse_projections(module, ["down_proj"]), activation_of(module))
    if isinstance(spec, AttentionSpec):
        qkv = _fuse_projections(module, spec.projections)
        norms = [module.q_norm, module.k_norm] if spec.qk_norm else []
        norms = [_build_layer(norm, specs) if norm in specs else norm for norm in norms]
        return DecodingAttention(qkv, _fuse_projections(module, ["o_proj"]), spec, norms, module.layer_idx)
    return FusedLinear([module], decodes=True)


def _fuse_projections(module: Any, names: Sequence[str]) -> FusedLinear:
    return FusedLinear([getattr(module, name) for name in names], decodes=True)
