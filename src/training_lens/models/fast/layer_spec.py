"""What a layer computes: the specs of norms, gated MLPs and attentions, and the parts of their formulas that all share.

A spec says which formula a module follows; it holds no tensors. `recognition` finds the specs of a model's layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from training_lens.models.fast.native.attention_kernels import ScoreSpec

ACTIVATIONS = ("act_fn", "activation_fn")  # transformers' names of an MLP's activation

NormKind = Literal["rms", "layer"]
QKNorm = Literal["head", "width"]
Rotary = Literal["halves", "interleaved"]


class UnknownLayerError(Exception):
    """Why a layer's formula is not known."""


@dataclass(frozen=True)
class NormSpec:
    """A norm over the last dimension, without a bias: RMSNorm (arXiv 1910.07467) or LayerNorm."""

    kind: NormKind
    epsilon: float
    adds_one: bool = False  # the factor is 1 + weight, as in Gemma


@dataclass(frozen=True)
class MLPSpec:
    """down_proj(a(gate x) * up x): the names of gate and up projections, and of a (None: not in `kernels`)."""

    gate_up: tuple[str, ...]
    activation: str | None


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention whose heads share the keys and values of their group (arXiv 2305.13245)."""

    projections: tuple[str, ...]  # the names of those of queries, keys and values
    heads: int
    groups: int
    head_size: int
    scores: ScoreSpec
    qk_norm: QKNorm | None  # head by head or over all heads at once; None: not normalized
    rotary: Rotary | None  # which numbers of a head are rotated together (arXiv 2104.09864); None: no positions

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Heads of queries, keys and values."""
        return self.heads, self.groups, self.groups


LayerSpec = NormSpec | MLPSpec | AttentionSpec


def normalize(x: Tensor, weight: Tensor, spec: NormSpec) -> Tensor:
    """A norm's formula in float32 or wider, rounded once: what a spec means."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if spec.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    unit = wide * (wide.square().mean(-1, keepdim=True) + spec.epsilon).rsqrt()
    return (unit * (weight.to(wide.dtype) + float(spec.adds_one))).to(x.dtype)


def activation_of(module: Any) -> Any:
    """An MLP's activation; None without one."""
    return next((getattr(module, name) for name in ACTIVATIONS if hasattr(module, name)), None)


def split_heads(fused: Tensor, spec: AttentionSpec, norms: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection (*tokens, width), each (*tokens, heads, size), and normalized.

    `norms` has `q_norm` and `k_norm` where the spec has them.
    """
    if spec.qk_norm == "width":
        query, key, value = fused.split([count * spec.head_size for count in spec.sizes], -1)
        parts = (norms.q_norm(query), norms.k_norm(key), value)
        query, key, value = (part.unflatten(-1, (-1, spec.head_size)) for part in parts)
        return query, key, value
    query, key, value = fused.view(*fused.shape[:-1], -1, spec.head_size).split(spec.sizes, -2)
    if spec.qk_norm == "head":
        return norms.q_norm(query), norms.k_norm(key), value
    return query, key, value
