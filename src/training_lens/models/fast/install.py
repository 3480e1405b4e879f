"""A model's modules computed by our kernels: norms, adapted linear layers, gated MLPs, packed attention.

A module keeps its class, its parameters and its hooks; only its forward is another. One that is not recognized, or
whose kernel gives something else on random input, keeps its own forward, too; the report says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.fused_layers import FusedMLP, apply_norm, norm_factors, rotate_projections
from training_lens.models.fast.fused_linear import FusedLinear, weight_dtype
from training_lens.models.fast.layer_spec import AttentionSpec, MLPSpec, NormSpec, UnknownLayerError
from training_lens.models.fast.native.attention_kernels import PackedSequences
from training_lens.models.fast.packed_attention import packed_attention
from training_lens.models.fast.recognition import RecognizedLayers, recognize_layers
from training_lens.models.fast.token_dropout import TokenDraws, drop_columns
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close
from training_lens.models.model_classes import decoder_of, evaluation_mode, has_own_kernels
from training_lens.models.sharding import gathered
from training_lens.utils.devices import DTYPES, Precision, autocast
from training_lens.utils.resource_errors import raise_out_of_memory

PROBE_TOKENS = 6  # of the random input on which a module and its kernel are compared


class ModuleKernel:
    """What computes a module's calls in its place; `plain` is the module's own forward.

    Args:
        input_width: numbers of a token that goes in.

    Raises:
        UnknownLayerError: it cannot compute this module.
    """

    def __init__(self, module: Any, input_width: int) -> None:
        self.module, self.plain, self.input_width = module, module.forward, input_width

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def matches_module(self) -> bool:
        """Whether it gives what the module itself gives, on random input."""
        device = next((t.device for t in (*self.module.parameters(), *self.module.buffers())), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)  # of its own: the run's random numbers stay what they are
        quantized = [m for m in self.module.modules() if hasattr(m, "compute_dtype")]  # bitsandbytes'
        frozen = [p for p in self.module.parameters() if not p.requires_grad and p.is_floating_point()]
        dtype = weight_dtype(quantized[0]) if quantized else frozen[0].dtype if frozen else torch.float32
        x = torch.randn(PROBE_TOKENS, self.input_width, generator=generator).to(device, dtype)
        with evaluation_mode(self.module):
            return is_close(self(x), self.plain(x))


class NormKernel(ModuleKernel):
    """A norm with a frozen weight."""

    def __init__(self, module: Any, spec: NormSpec) -> None:
        super().__init__(module, module.weight.shape[0])
        if module.weight.requires_grad:
            raise UnknownLayerError(f"{type(module).__name__} without a frozen weight")
        self._spec = spec

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.module.weight
        if weight.dtype != x.dtype:
            return self.plain(x)  # type: ignore[no-any-return]
        return apply_norm(x, norm_factors(weight, self._spec), self._spec)


class LinearKernel(ModuleKernel):
    """A linear layer with LoRA or DoRA."""

    def __init__(self, module: Any, _spec: None = None) -> None:
        super().__init__(module, module.in_features)
        self._linear = FusedLinear([module])

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x) if self._linear.is_ready else self.plain(x)  # type: ignore[no-any-return]


class MLPKernel(ModuleKernel):
    """A gated MLP with fused gate and up projections."""

    def __init__(self, module: Any, spec: MLPSpec) -> None:
        self._mlp = FusedMLP(module, spec)
        super().__init__(module, self._mlp.gate_up.input_width)

    def __call__(self, x: Tensor) -> Tensor:
        is_ready = can_fuse(self._mlp.gate_up) and can_fuse(self._mlp.down)
        return self._mlp(x) if is_ready else self.plain(x)  # type: ignore[no-any-return]


class DropoutKernel(ModuleKernel):
    """A dropout that drops by its tokens, where the pass says which they are; else by torch's random state."""

    def __init__(self, module: nn.Dropout, path: str, draws: TokenDraws) -> None:
        super().__init__(module, 0)
        self._draws, self._name = draws, draws.add_layer(path)

    def __call__(self, x: Tensor) -> Tensor:
        share, rows = self.module.p, x.numel() // max(1, x.shape[-1])
        drawn = self._draws.find(self._name, rows) if self.module.training and 0 < share < 1 else None
        return self.plain(x) if drawn is None else drop_columns(x, drawn, share)


def can_fuse(linear: FusedLinear) -> bool:
    """Whether no hook waits for the results of the single layers."""
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in linear.layers)
    return not hooked and linear.is_ready


class AttentionKernel(ModuleKernel):
    """Attention of packed sequences; all other calls are the module's own."""

    def __init__(self, module: Any, spec: AttentionSpec) -> None:
        self._qkv = FusedLinear([getattr(module, name) for name in spec.projections])
        self._out = FusedLinear([module.o_proj])
        self._spec = spec
        super().__init__(module, self._qkv.input_width)

    def __call__(self, *args: Any, packed: PackedSequences | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return self.plain(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        query, key, value = rotate_projections(_apply_linear(self._qkv, x[0]), self._spec, self.module, cos[0], sin[0])
        out = packed_attention(query, key, value, packed, self._spec.scores)
        return _apply_linear(self._out, out.flatten(1))[None], None


def _apply_linear(linear: FusedLinear, x: Tensor) -> Tensor:
    if can_fuse(linear):
        return linear(x)  # type: ignore[no-any-return]
    return torch.cat([layer(x) for layer in linear.layers], -1)


@dataclass
class InstalledKernels:
    """How many modules of each kind the kernels compute, and how many keep their own forward, by the reason.

    `draws` is what the model's dropouts drop by.
    """

    installed: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    draws: TokenDraws = field(default_factory=TokenDraws)

    @property
    def can_pack(self) -> bool:
        """Whether sequences can be packed, so that nothing is padded."""
        return self.installed["attention"] > 0

    def count_modules(self, kind: str, refusals: Sequence[str]) -> None:
        """Count modules of a kind; a refusal is '' where a kernel computes the module."""
        self.installed.update([kind] * refusals.count(""))
        self.skipped.update(filter(None, refusals))

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in self.installed.items() if count) or "nothing"
        left = "".join(f"; {count} as they are ({why})" for why, count in self.skipped.items())
        return f"kernels compute {done}{left}"


def install_kernels(model: Any, precision: Precision = "fp32") -> InstalledKernels:
    """Let kernels compute what they can of a PEFT model, in place; `uninstall_kernels` takes it back.

    Args:
        precision: of training's passes; fp32: the weights' own.
    """
    report = InstalledKernels()
    if has_own_kernels(model):
        report.skipped["layers that unsloth computes"] += 1
        return report
    layers = recognize_layers(model)
    _install_attention(model, layers, precision, report)
    adapted = [m for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "lora_A")]
    modules_by_kind: dict[str, tuple[Any, list[tuple[Any, Any]]]] = {
        "gated MLPs": (MLPKernel, [(m, spec) for m, spec in layers.specs.items() if isinstance(spec, MLPSpec)]),
        "adapted layers": (LinearKernel, [(m, None) for m in adapted]),
        "norms": (NormKernel, [(m, spec) for m, spec in layers.specs.items() if isinstance(spec, NormSpec)]),
    }
    for kind, (kernel, modules) in modules_by_kind.items():
        for module, spec in modules:
            if refusal := install_kernel(module, kernel, spec):
                report.skipped[refusal] += 1
            else:
                report.installed[kind] += 1
    for path, module in model.named_modules():
        is_dropout = type(module) is nn.Dropout and module.p > 0
        if is_dropout and "forward" not in module.__dict__:
            module.forward = DropoutKernel(module, path, report.draws)
            report.installed["dropouts"] += 1
    return report


def uninstall_kernels(model: Any) -> None:
    """Give every module its own forward again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), ModuleKernel):
            del module.__dict__["forward"]


def installed_kernels(model: Any) -> list[ModuleKernel]:
    """The kernels that compute modules of the model in their place."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return [forward for forward in forwards if isinstance(forward, ModuleKernel)]


def install_kernel(module: Any, kind: Any, spec: Any) -> str:
    """Let a kernel of a class compute a module's calls; or else, why not."""
    if "forward" in module.__dict__:
        return f"{type(module).__name__} has a forward of its own"
    try:
        with gathered(module):
            kernel = kind(module, spec)
            matches = kernel.matches_module()
    except UnknownLayerError as reason:
        return str(reason)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:  # a module of that name with other arguments
        raise_out_of_memory(error)
        return f"{type(module).__name__} takes something else"
    if not matches:
        return f"{type(module).__name__} computes something else"
    module.forward = kernel
    return ""


def _install_attention(model: Any, layers: RecognizedLayers, precision: Precision, report: InstalledKernels) -> None:
    """All attentions, or none: packed sequences go through every one of them."""
    report.skipped.update(layers.refusals.values())
    count = len(layers.attentions)
    try:
        if refusal := unpackable_layers(model) or layers.attention_refusal:
            raise UnknownLayerError(refusal)
        kernels = [AttentionKernel(module, spec) for module, spec in layers.attentions.items()]
    except UnknownLayerError as reason:
        report.skipped.setdefault(str(reason), max(1, count))
        return
    for kernel in kernels:
        kernel.module.forward = kernel
    if is_packing_exact(model) and (precision == "fp32" or is_packing_exact(model, precision)):
        report.installed["attention"] = count
    else:
        uninstall_kernels(model)
        report.skipped["attention that computes something else"] += count


def unpackable_layers(model: Any) -> str:
    """Why packed sequences would see each other in some layers of a model; empty where they would not.

    State-space layers carry their state into the next sequence, and chunks are counted from the first one's beginning.
    """
    decoder = decoder_of(model)
    kinds = set(getattr(decoder.config.get_text_config(), "layer_types", None) or ())
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"layers of {unknown[0]}"
    if any(isinstance(m, nn.Conv1d) for m in decoder.modules()):
        return "layers that carry a state from token to token"
    return ""


def is_packing_exact(model: Any, precision: Precision = "fp32") -> bool:
    """Whether two packed examples give the hidden states and the gradients that each gives alone.

    Args:
        precision: of the passes, by autocast; fp32: the weights' own.
    """
    decoder = decoder_of(model)
    device = next(decoder.parameters()).device
    ids = [torch.arange(2, 2 + length, device=device)[None] for length in (PROBE_TOKENS, PROBE_TOKENS - 2)]
    packed = PackedSequences(tuple(part.shape[1] for part in ids))
    try:
        with evaluation_mode(decoder):
            with torch.enable_grad(), autocast(device, precision):
                alone = torch.cat([decoder(input_ids=part, use_cache=False)[0] for part in ids], 1)
                together = forward_packed(decoder, torch.cat(ids, 1), packed)[0]
            dtype = alone.dtype if precision == "fp32" else DTYPES[precision]
            pairs = [(together.detach(), alone.detach()), *_pair_gradients(decoder, together, alone)]
    except (TypeError, ValueError, RuntimeError, LookupError) as error:  # an architecture without these arguments
        raise_out_of_memory(error)
        return False
    return all(is_close(found, wanted, WHOLE_MODEL, dtype) for found, wanted in pairs)


def _pair_gradients(decoder: Any, together: Tensor, alone: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The gradient of all trained parameters by both passes, one vector each; nothing where the decoder trains none."""
    trained = [p for p in decoder.parameters() if p.requires_grad]
    if not trained:
        return []
    weights = torch.linspace(-1, 1, alone.shape[-1], device=alone.device)  # of the sum whose gradient is compared
    both = [
        torch.autograd.grad((states.float() * weights).sum(), trained, allow_unused=True)
        for states in (together, alone)
    ]
    found, wanted = (torch.cat([g.float().flatten() for g in gradients if g is not None]) for gradients in both)
    return [(found, wanted)]


def forward_packed(decoder: Any, input_ids: Tensor, packed: PackedSequences) -> Any:
    """The decoder's output for packed examples; its first part is the last hidden states, (1, tokens, hidden)."""
    no_mask = input_ids.new_zeros(1, 1, 0, 0)  # transformers passes four dimensions through; no kernel reads it
    return decoder(
        input_ids=input_ids,
        position_ids=packed.position_ids(input_ids.device),
        attention_mask=no_mask,
        use_cache=False,
        packed=packed,
    )
