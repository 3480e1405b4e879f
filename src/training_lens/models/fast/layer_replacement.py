"""Puts decoding's layers in a model, where they give the same results.

A first pass over a prompt records what every recognized layer is given and gives. Its replacement is given the same,
and stands in only where its result is the same up to rounding; every other layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from training_lens.models.fast.fused_layers import DecodingAttention, DecodingNorm, FusedMLP
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.layer_spec import AttentionSpec, LayerSpec, MLPSpec, NormSpec, UnknownLayerError
from training_lens.models.fast.recognition import recognize_layers
from training_lens.models.fast.tolerance import is_close
from training_lens.utils.resource_errors import raise_out_of_memory

Specs = dict[Any, LayerSpec]


def replace_layers(model: Any, ids: Tensor) -> list[str]:
    """Put decoding's layers into `model`, in place; why others of its layers decode by themselves.

    `model` has modules of its own, with adapters merged or not, and is called without gradients; `ids` are those of a
    real prompt, (1, tokens) int64. Cost: a pass over them, one of a few tokens, and each replaced layer once more.
    """
    layers = recognize_layers(model)
    head = model.get_output_embeddings()
    known = {name for name, module in model.named_modules() if module in layers.specs or module is head}
    inside = tuple(f"{name}." for name in known)  # of a layer that is replaced whole
    names = [name for name, _ in model.named_modules() if name in known and not name.startswith(inside)]
    calls = _record_calls(model, ids, names)
    reasons = [_replace_layer(model, name, layers.specs, calls.get(name)) for name in names]
    return list(dict.fromkeys(filter(None, [*layers.refusals.values(), *reasons])))


def _record_calls(model: Any, ids: Tensor, names: Sequence[str]) -> dict[str, tuple[Any, Any, Any]]:
    """Arguments, keyword arguments and result of each of these modules in a pass over `ids`."""
    calls: dict[str, tuple[Any, Any, Any]] = {}

    def note(name: str, _module: Any, given: Any, options: Any, result: Any) -> None:
        calls[name] = given, options, result

    with ExitStack() as stack:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(partial(note, name), with_kwargs=True)
            stack.callback(hook.remove)
        model(input_ids=ids, use_cache=False)
    return calls


def _replace_layer(model: Any, name: str, specs: Specs, call: tuple[Any, Any, Any] | None) -> str:
    """Replace one module where the result is the same; else, why not."""
    module = model.get_submodule(name)
    kind = type(module).__name__
    if call is None:
        return f"{kind} is not called"
    given, options, result = call
    try:
        layer = _build_layer(module, specs)
        found = layer(*given, **options)
        consistent = all(part.gives_same_for_few_rows() for part in layer.modules() if isinstance(part, FusedLinear))
    except UnknownLayerError as reason:
        return str(reason)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise_out_of_memory(error)
        return f"{kind} takes something else"
    found, expected = (x[0] if isinstance(x, tuple) else x for x in (found, result))
    if not (consistent and is_close(found, expected)):
        return f"{kind} computes something else"
    model.set_submodule(name, layer)
    return ""


def _build_layer(module: Any, specs: Specs) -> nn.Module:
    spec = specs.get(module)
    if isinstance(spec, NormSpec):
        return DecodingNorm(module.weight, spec)
    if isinstance(spec, MLPSpec):
        return FusedMLP(module, spec, decodes=True)
    if isinstance(spec, AttentionSpec):
        norms = [module.q_norm, module.k_norm] if spec.qk_norm else []
        return DecodingAttention(module, spec, [_build_layer(n, specs) if n in specs else n for n in norms])
    return FusedLinear([module], decodes=True)
