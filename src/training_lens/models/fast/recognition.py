"""Recognizes what a model's layers compute, once for training and for decoding.

A norm's and an attention's spec is the candidate that reproduces the module's own numbers. Whoever builds a faster
layer from a spec still compares the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.fused_layers import rotate_projections
from training_lens.models.fast.kernels import activation_name
from training_lens.models.fast.layer_spec import (
    ACTIVATIONS,
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    NormKind,
    NormSpec,
    QKNorm,
    Rotary,
    UnknownLayerError,
    activation_of,
    normalize,
)
from training_lens.models.fast.native.attention_kernels import ScoreSpec
from training_lens.models.fast.tolerance import is_close, relative_error
from training_lens.models.model_classes import decoder_of, evaluation_mode
from training_lens.models.quantization import has_8bit_layers
from training_lens.models.sharding import gathered
from training_lens.utils.resource_errors import raise_out_of_memory

RECORDER = "training_lens_recorder"  # the attention function under which transformers calls ours
PROBE_IDS = ((2, 3, 4, 5),)
QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))  # separate projections, or one fused
GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
EPSILONS = ("variance_epsilon", "eps")
KNOWN_OPTIONS = (  # of transformers' attention functions: those that change nothing here, or that a spec holds
    "dropout", "scaling", "sliding_window", "softcap", "position_ids", "use_cache", "cache_position", "is_causal",
)  # fmt: skip


@dataclass
class RecognizedLayers:
    """The specs of a model's norms, gated MLPs and attentions; and why others of these kinds have none."""

    specs: dict[Any, LayerSpec] = field(default_factory=dict)
    refusals: dict[Any, str] = field(default_factory=dict)

    @property
    def attentions(self) -> dict[Any, AttentionSpec]:
        """The decoder's attentions, if all of them are recognized; else none."""
        known = {module: spec for module, spec in self.specs.items() if isinstance(spec, AttentionSpec)}
        return {} if any(map(_is_attention, self.refusals)) else known

    @property
    def attention_refusal(self) -> str:
        """Why not all attentions are recognized; empty where they are."""
        reason = next((why for module, why in self.refusals.items() if _is_attention(module)), "")
        return reason or ("" if self.attentions else "no attention that is known")


@torch.no_grad()
def recognize_layers(model: Any) -> RecognizedLayers:
    """The specs of a causal model's layers; the model stays as it is.

    Cost: one pass of a few tokens without attention, and a norm's formulas once each.
    """
    found = RecognizedLayers()
    with evaluation_mode(model):
        calls = record_attentions(model)
        for module in model.modules():
            try:
                with gathered(module) if module in calls or _is_norm(module) else nullcontext():
                    if spec := _recognize(module, calls):
                        found.specs[module] = spec
            except UnknownLayerError as reason:
                found.refusals[module] = str(reason)
    return found


def _recognize(module: Any, calls: dict[Any, AttentionCall | None]) -> LayerSpec | None:
    """The module's spec; None where it is of no kind that has one."""
    if not (module in calls or _is_norm(module) or _is_gated_mlp(module)):
        return None
    if "forward" in module.__dict__:
        raise UnknownLayerError(f"{type(module).__name__} has a forward of its own")
    if module in calls:
        return recognize_attention(module, calls[module])
    return recognize_norm(module) if _is_norm(module) else recognize_mlp(module)


def find_projections(module: Any, choices: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of the choices of which the module has all; () where it has none."""
    return next((names for names in choices if all(_has_child(module, name) for name in names)), ())


def _has_child(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _has_only(module: Any, names: Sequence[str]) -> bool:
    """Whether no parameter of the module lies outside its children of these names, and nothing else drops out."""
    others = [child for name, child in module.named_children() if name not in names]
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for child in others for part in child.modules())
    parameters = [*module.parameters(recurse=False), *(p for child in others for p in child.parameters())]
    return not drops and not parameters


def _is_attention(module: Any) -> bool:
    return type(module).__name__.endswith("Attention")


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "CohereLayerNorm", "Cohere2LayerNorm"))


def recognize_norm(module: Any) -> NormSpec:
    """The formula of a norm, known by its results on one random row.

    Raises:
        UnknownLayerError: it follows no formula that is known.
    """
    name, weight = type(module).__name__, getattr(module, "weight", None)
    epsilon = next((getattr(module, e) for e in EPSILONS if isinstance(getattr(module, e, None), float)), None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.is_floating_point() or epsilon is None:
        raise UnknownLayerError(f"{name} without a weight and an epsilon")
    x = torch.linspace(-2, 3, len(weight), device=weight.device).to(weight.dtype)[None]
    kinds: tuple[NormKind, NormKind] = ("rms", "layer")
    candidates = [NormSpec(kind, epsilon, adds_one) for kind, adds_one in product(kinds, (False, True))]
    try:
        expected = module.forward(x)  # past any hooks
        results = [normalize(x, weight, spec) for spec in candidates]
        _, best = min((relative_error(result, expected), i) for i, result in enumerate(results))
    except (TypeError, ValueError, RuntimeError) as error:
        raise_out_of_memory(error)
        raise UnknownLayerError(f"{name} takes something else") from error
    if not is_close(results[best], expected):
        raise UnknownLayerError(f"{name} computes something else")
    return candidates[best]


def _is_gated_mlp(module: Any) -> bool:
    has_projections = _has_child(module, "down_proj") and bool(find_projections(module, GATE_UP))
    return has_projections and activation_of(module) is not None


def recognize_mlp(module: Any) -> MLPSpec:
    """The structure of a gated MLP.

    Raises:
        UnknownLayerError: it has more than that.
    """
    names = find_projections(module, GATE_UP)
    if not _has_only(module, (*names, "down_proj", *ACTIVATIONS)):
        raise UnknownLayerError(f"{type(module).__name__} with more than a gated MLP")
    return MLPSpec(names, activation_name(activation_of(module)))


@dataclass(frozen=True)
class AttentionCall:
    """What an attention module was given, and what it gave to the function that attends."""

    hidden: Tensor  # (tokens, width)
    cos: Tensor  # (tokens, rotated)
    sin: Tensor
    query: Tensor  # (tokens, heads, size)
    key: Tensor
    value: Tensor
    options: dict[str, Any]


def recognize_attention(module: Any, call: AttentionCall | None) -> AttentionSpec:
    """The structure of an attention module, known by the queries and keys of one call.

    Args:
        call: from `record_attentions`.

    Raises:
        UnknownLayerError: it has another structure, or more than a spec holds.
    """
    names = find_projections(module, QUERY_KEY_VALUE)
    if not names or not _has_child(module, "o_proj"):
        raise UnknownLayerError("attention of another structure")
    if call is None:
        raise UnknownLayerError("attention that cannot be observed")
    if not _has_only(module, (*names, "o_proj", "q_norm", "k_norm")):
        raise UnknownLayerError("attention with more than projections and norms")
    if getattr(module, "attention_dropout", 0.0):
        raise UnknownLayerError("attention with dropout")
    unknown = {k for k, v in call.options.items() if v is not None and v is not False} - {*KNOWN_OPTIONS}
    if call.value.shape != call.key.shape or unknown:
        raise UnknownLayerError("attention with more than scale, window and softcap")
    candidates = _candidate_specs(module, names, call)
    (_, is_same), best = min((_compare_projections(module, spec, call), i) for i, spec in enumerate(candidates))
    if not is_same:
        raise UnknownLayerError("attention whose queries and keys are formed otherwise")
    return candidates[best]


def _candidate_specs(module: Any, names: tuple[str, ...], call: AttentionCall) -> list[AttentionSpec]:
    (_, heads, size), groups, options = call.query.shape, call.key.shape[1], call.options
    scale = float(options.get("scaling") or size**-0.5)
    scores = ScoreSpec(scale, options.get("sliding_window"), options.get("softcap"))
    rotaries: tuple[Rotary | None, ...] = ("halves", "interleaved", None)
    qk_norm: QKNorm | None = None
    if _has_child(module, "q_norm") and _has_child(module, "k_norm"):
        qk_norm = "width" if module.q_norm.weight.shape == (heads * size,) else "head"
    return [AttentionSpec(names, heads, groups, size, scores, qk_norm, rotary) for rotary in rotaries]


def _compare_projections(module: Any, spec: AttentionSpec, call: AttentionCall) -> tuple[float, bool]:
    """The error of queries and keys by the module's own parts, and whether they and values are those of the call."""
    wanted = (call.query, call.key, call.value)
    try:
        fused = torch.cat([getattr(module, name).forward(call.hidden) for name in spec.projections], -1)  # past hooks
        found = rotate_projections(fused, spec, module, call.cos, call.sin)
        errors = [relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
    except (TypeError, ValueError, RuntimeError) as error:  # sizes that do not fit
        raise_out_of_memory(error)
        return float("inf"), False
    return errors[0] + errors[1], all(map(is_close, found, wanted))


def record_attentions(model: Any) -> dict[Any, AttentionCall | None]:
    """What each attention of the decoder gives to the function that attends, in a pass in which none attends.

    None for an attention that calls no such function, and for all where the pass fails or weights are in 8 bits.
    """
    modules = list(filter(_is_attention, decoder_of(model).modules()))
    calls: dict[Any, AttentionCall | None] = dict.fromkeys(modules)
    if has_8bit_layers(model):  # no kernel reads them
        return calls
    given: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        hidden, angles = kwargs.get("hidden_states", args[0] if args else None), kwargs.get("position_embeddings")
        if hidden is not None and isinstance(angles, tuple):
            given[module] = hidden[0], angles[0][0], angles[1][0]

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **options: Any) -> Any:
        if module in given:
            query_, key_, value_ = (part[0].transpose(0, 1) for part in (query, key, value))
            calls[module] = AttentionCall(*given[module], query_, key_, value_, options)
        return query.transpose(1, 2).contiguous(), None

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        _run_with_attention(decoder_of(model), record)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise_out_of_memory(error)
        return dict.fromkeys(modules)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _run_with_attention(decoder: Any, attend: Any) -> None:
    """A pass of a few tokens in which `attend` stands for transformers' attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = decoder.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[RECORDER] = attend
    try:
        decoder.config._attn_implementation = RECORDER
        decoder(input_ids=torch.tensor(PROBE_IDS, device=next(decoder.parameters()).device), use_cache=False)
    finally:
        decoder.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[RECORDER]
