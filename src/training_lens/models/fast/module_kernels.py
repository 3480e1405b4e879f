"""Modules of a model whose calls kernels compute in their place: norms, adapted and gated layers, attention.

A module keeps its class, its parameters and its hooks; only what its call computes goes another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.kernels import activation_name, apply_gate, apply_rotary, rms_norm
from training_lens.models.fast.layer_spec import GATE_UP, QUERY_KEY_VALUE, Heads, projections
from training_lens.models.fast.packed_attention import PackedSequences, packed_attention

PROBE_TOKENS = 6  # of the random input on which a module and its kernel are compared
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest number


class ModuleKernel:
    """What a module's call computes in its place; `plain` is its own forward."""

    def __init__(self, module: Any) -> None:
        self.module, self.plain = module, module.forward

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether the module is of the kind."""
        raise NotImplementedError

    @staticmethod
    def refusal(module: Any) -> str:
        """Why one of the kind cannot be computed by it; empty where it can be tried."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def input_width(self) -> int:
        """Of the input."""
        raise NotImplementedError

    @torch.no_grad()
    def matches_module(self) -> bool:
        """Whether it gives what the module itself gives, on random input."""
        device = next((t.device for t in (*self.module.parameters(), *self.module.buffers())), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)  # of its own: the run's draws stay what they are
        x = torch.randn(PROBE_TOKENS, self.input_width, generator=generator).to(device, _frozen_dtype(self.module))
        was_training = self.module.training
        self.module.eval()  # dropout draws
        try:
            return close(self(x), self.plain(x))
        finally:
            self.module.train(was_training)


def _frozen_dtype(module: Any) -> torch.dtype:
    """The dtype of the frozen weights, which is that of the states."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    return frozen[0].dtype if frozen else torch.float32


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ by no more than rounding in their dtype (`CLOSE`)."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    most = CLOSE[wanted.dtype] * max(1e-6, wanted.abs().max().item())
    return bool((found - wanted).abs().max() <= most)


class NormKernel(ModuleKernel):
    """RMSNorm with a frozen weight, which Gemma counts from 1 and multiplies before it rounds."""

    @staticmethod
    def fits(module: Any) -> bool:
        return type(module).__name__.endswith("RMSNorm")

    @staticmethod
    def refusal(module: Any) -> str:
        known = isinstance(getattr(module, "weight", None), Tensor) and _epsilon(module) is not None
        return "" if known and not module.weight.requires_grad else f"{type(module).__name__} without a frozen weight"

    @torch.no_grad()
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        weight = module.weight.float()
        found = self.plain(torch.ones_like(module.weight)[None]).float()  # the factor, but for epsilon
        self._from_one = bool((found - weight - 1).abs().mean() < (found - weight).abs().mean())

    @property
    def input_width(self) -> int:
        return int(self.module.weight.shape[0])

    def __call__(self, x: Tensor) -> Tensor:
        weight, epsilon = self.module.weight, _epsilon(self.module)
        if weight.dtype != x.dtype or epsilon is None:
            return self.plain(x)  # type: ignore[no-any-return]
        if self._from_one:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1
        return rms_norm(x, weight, epsilon)


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class LinearKernel(ModuleKernel):
    """A linear layer with LoRA or DoRA."""

    @staticmethod
    def fits(module: Any) -> bool:
        return hasattr(module, "get_base_layer") and hasattr(module, "lora_A")

    @staticmethod
    def refusal(module: Any) -> str:
        return FusedLinear.refusal([module])

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._product = FusedLinear([module])

    @property
    def input_width(self) -> int:
        return int(self.module.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x) if self._product.is_ready else self.plain(x)


class MLPKernel(ModuleKernel):
    """A gated feed-forward layer, down(a(gate(x)) * up(x)), with an activation that is known."""

    @staticmethod
    def fits(module: Any) -> bool:
        down = isinstance(getattr(module, "down_proj", None), nn.Module)
        return down and bool(projections(module, GATE_UP)) and _activation(module) is not None

    @staticmethod
    def refusal(module: Any) -> str:
        if activation_name(_activation(module)) is None:
            return f"{type(module).__name__} with another activation"
        return FusedLinear.refusal(projections(module, GATE_UP)) or FusedLinear.refusal([module.down_proj])

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._gate_up, self._down = FusedLinear(projections(module, GATE_UP)), FusedLinear([module.down_proj])
        self._name = activation_name(_activation(module))

    @property
    def input_width(self) -> int:
        return int(projections(self.module, GATE_UP)[0].in_features)

    def __call__(self, x: Tensor) -> Tensor:
        if self._name is None or not (can_fuse(self._gate_up) and can_fuse(self._down)):
            return self.plain(x)  # type: ignore[no-any-return]
        return self._down(apply_gate(self._gate_up(x), self._name))


def _activation(module: Any) -> Any:
    return getattr(module, "act_fn", getattr(module, "activation_fn", None))


def can_fuse(product: FusedLinear) -> bool:
    """Whether nobody looks at the single layers."""
    watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in product.layers)
    return not watched and product.is_ready


class AttentionKernel(ModuleKernel):
    """Attention of examples in a line; all other calls are the module's own."""

    @staticmethod
    def refusal(module: Any) -> str:
        into = projections(module, QUERY_KEY_VALUE)
        if not into or not isinstance(getattr(module, "o_proj", None), nn.Module):
            return "attention of another structure"
        return FusedLinear.refusal(into) or FusedLinear.refusal([module.o_proj])

    def __init__(self, module: Any, heads: Heads) -> None:
        super().__init__(module)
        self._heads = heads
        self._qkv, self._out = FusedLinear(projections(module, QUERY_KEY_VALUE)), FusedLinear([module.o_proj])

    def __call__(self, *args: Any, packed: PackedSequences | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return self.plain(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        query, key, value = self._project_heads(x[0], cos[0], sin[0])
        out = packed_attention(query, key, value, packed, self._heads.scale, self._heads.window)
        return _apply_linear(self._out, out.flatten(1))[None], None

    def _project_heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of (tokens, hidden), each (tokens, heads, width)."""
        heads = self._heads
        parts = [heads.count, heads.groups, heads.groups]
        together = _apply_linear(self._qkv, x).view(len(x), -1, heads.width)
        if heads.normed:
            query, key, value = together.split(parts, 1)
            query, key = self.module.q_norm(query), self.module.k_norm(key)
            return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value
        turning, value = together.split([parts[0] + parts[1], parts[2]], 1)
        query, key = apply_rotary(turning, cos, sin).split(parts[:2], 1)
        return query, key, value


def _apply_linear(product: FusedLinear, x: Tensor) -> Tensor:
    return product(x) if can_fuse(product) else torch.cat([layer(x) for layer in product.layers], -1)
