"""Kernels that compute a module's calls in its place: norms, adapted linear layers, gated MLPs, packed attention.

A module keeps its class, its parameters and its hooks; only its forward is another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.kernels import apply_gate, apply_rotary, rms_norm
from training_lens.models.fast.layer_spec import (
    AttentionSpec,
    MLPSpec,
    NormSpec,
    UnknownLayerError,
    activation_of,
    split_heads,
)
from training_lens.models.fast.packed_attention import PackedSequences, packed_attention
from training_lens.models.fast.tolerance import is_close

PROBE_TOKENS = 6  # of the random input on which a module and its kernel are compared


class ModuleKernel:
    """What computes a module's calls in its place; `plain` is the module's own forward.

    Raises:
        UnknownLayerError: it cannot compute this module.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.plain = module, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def input_width(self) -> int:
        """Numbers of a token that goes in."""
        raise NotImplementedError

    @torch.no_grad()
    def matches_module(self) -> bool:
        """Whether it gives what the module itself gives, on random input."""
        device = next((t.device for t in (*self.module.parameters(), *self.module.buffers())), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)  # of its own: the run's random numbers stay what they are
        x = torch.randn(PROBE_TOKENS, self.input_width, generator=generator).to(device, _frozen_dtype(self.module))
        was_training = self.module.training
        self.module.eval()  # dropout draws
        try:
            return is_close(self(x), self.plain(x))
        finally:
            self.module.train(was_training)


def _frozen_dtype(module: Any) -> torch.dtype:
    """The dtype of the frozen weights, which is that of the hidden states."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    return frozen[0].dtype if frozen else torch.float32


class NormKernel(ModuleKernel):
    """RMSNorm, whose weight Gemma counts from 1 and multiplies before it rounds, or LayerNorm; with a frozen weight."""

    def __init__(self, module: Any, spec: NormSpec) -> None:
        super().__init__(module)
        if module.weight.requires_grad:
            raise UnknownLayerError(f"{type(module).__name__} without a frozen weight")
        self._spec = spec

    @property
    def input_width(self) -> int:
        return int(self.module.weight.shape[0])

    def __call__(self, x: Tensor) -> Tensor:
        weight, spec = self.module.weight, self._spec
        if weight.dtype != x.dtype:
            return self.plain(x)  # type: ignore[no-any-return]
        if spec.adds_one:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1
        if spec.kind == "rms":
            return rms_norm(x, weight, spec.epsilon)
        with torch.autocast(x.device.type, enabled=False):
            return layer_norm(x, weight.shape, weight.to(x.dtype), None, spec.epsilon)


class LinearKernel(ModuleKernel):
    """A linear layer with LoRA or DoRA."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether PEFT adapts the module."""
        return hasattr(module, "get_base_layer") and hasattr(module, "lora_A")

    def __init__(self, module: Any, _spec: None = None) -> None:
        super().__init__(module)
        self._linear = FusedLinear([module])

    @property
    def input_width(self) -> int:
        return int(self.module.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x) if self._linear.is_ready else self.plain(x)  # type: ignore[no-any-return]


class MLPKernel(ModuleKernel):
    """A gated MLP, down(a(gate(x)) * up(x)), with fused gate and up projections."""

    def __init__(self, module: Any, spec: MLPSpec) -> None:
        super().__init__(module)
        self._gate_up = FusedLinear([getattr(module, name) for name in spec.gate_up])
        self._down = FusedLinear([module.down_proj])
        self._activation = spec.activation

    @property
    def input_width(self) -> int:
        return self._gate_up.input_width

    def __call__(self, x: Tensor) -> Tensor:
        if not (can_fuse(self._gate_up) and can_fuse(self._down)):
            return self.plain(x)  # type: ignore[no-any-return]
        gate_up = self._gate_up(x)
        if self._activation is not None:
            return self._down(apply_gate(gate_up, self._activation))  # type: ignore[no-any-return]
        gate, up = gate_up.chunk(2, -1)
        return self._down(activation_of(self.module)(gate) * up)  # type: ignore[no-any-return]


def can_fuse(linear: FusedLinear) -> bool:
    """Whether no hook waits for the results of the single layers."""
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in linear.layers)
    return not hooked and linear.is_ready


class AttentionKernel(ModuleKernel):
    """Attention of packed sequences; all other calls are the module's own."""

    def __init__(self, module: Any, spec: AttentionSpec) -> None:
        super().__init__(module)
        self._spec = spec
        self._qkv = FusedLinear([getattr(module, name) for name in spec.projections])
        self._out = FusedLinear([module.o_proj])

    def __call__(self, *args: Any, packed: PackedSequences | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return self.plain(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        query, key, value = self._project_heads(x[0], cos[0], sin[0])
        out = packed_attention(query, key, value, packed, self._spec.scores)
        return _apply_linear(self._out, out.flatten(1))[None], None

    def _project_heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (tokens, width), each (tokens, heads, size)."""
        spec, fused = self._spec, _apply_linear(self._qkv, x)
        interleaved = spec.rotary == "interleaved"
        if spec.rotary is None or spec.qk_norm is not None:
            query, key, value = split_heads(fused, spec, self.module)
            if spec.rotary is None:
                return query, key, value
            return apply_rotary(query, cos, sin, interleaved), apply_rotary(key, cos, sin, interleaved), value
        heads = fused.unflatten(-1, (-1, spec.head_size))  # queries and keys are rotated in one call
        rotated = apply_rotary(heads[:, : spec.heads + spec.groups], cos, sin, interleaved)
        query, key = rotated.split([spec.heads, spec.groups], 1)
        return query, key, heads[:, spec.heads + spec.groups :]


def _apply_linear(linear: FusedLinear, x: Tensor) -> Tensor:
    return linear(x) if can_fuse(linear) else torch.cat([layer(x) for layer in linear.layers], -1)
