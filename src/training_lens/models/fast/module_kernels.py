"""Kernels that compute a module's calls in its place: norms, adapted linear layers, gated MLPs, packed attention.

A module keeps its class, its parameters and its hooks; only its forward is another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training_lens.models.fast.fused_layers import FusedMLP, apply_norm, norm_factors, rotate_projections
from training_lens.models.fast.fused_linear import FusedLinear, weight_dtype
from training_lens.models.fast.layer_spec import AttentionSpec, MLPSpec, NormSpec, UnknownLayerError
from training_lens.models.fast.native.attention_kernels import PackedSequences
from training_lens.models.fast.packed_attention import packed_attention
from training_lens.models.fast.tolerance import is_close

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
        was_training = self.module.training
        self.module.eval()  # dropout draws
        try:
            return is_close(self(x), self.plain(x))
        finally:
            self.module.train(was_training)


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
