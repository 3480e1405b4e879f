"""Layers around fused linears: norm and gated MLP for training and decoding, attention over a KV cache for decoding.

Each computes what a layer of a transformers model does, and is put in where results are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.kernels import apply_gate, apply_rotary, rms_norm
from training_lens.models.fast.kv_cache import SlotCache
from training_lens.models.fast.layer_spec import AttentionSpec, MLPSpec, NormSpec, activation_of, split_heads
from training_lens.models.fast.native.attention_kernels import PackedAttentionCall, PackedSequences, ScoreSpec
from training_lens.models.fast.native.decoding_kernels import attend_newest_tokens
from training_lens.models.fast.native.library import are_heads_adjacent, can_compute
from training_lens.models.fast.packed_attention import attend_by_torch

Angles = tuple[Tensor, Tensor]  # cosines and sines for rotary embedding, (tokens, rotated) each, dense


def norm_factors(weight: Tensor, spec: NormSpec) -> Tensor:
    """What a norm multiplies by: its frozen weight; Gemma's counts from 1, and is multiplied before it is rounded."""
    weight = weight.detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1 if spec.adds_one else weight


def apply_norm(x: Tensor, factors: Tensor, spec: NormSpec) -> Tensor:
    """An RMSNorm or LayerNorm in one call; `factors` are its `norm_factors`."""
    if spec.kind == "rms":
        return rms_norm(x, factors, spec.epsilon)
    with torch.autocast(x.device.type, enabled=False):
        return functional.layer_norm(x, factors.shape, factors.to(x.dtype), None, spec.epsilon)


class DecodingNorm(nn.Module):
    """A norm whose factors are formed once."""

    def __init__(self, weight: Tensor, spec: NormSpec) -> None:
        super().__init__()
        self.spec, self.factors = spec, norm_factors(weight, spec)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "rms" and self.factors.dtype == x.dtype and not can_compute(x):  # torch has it in one pass
            return functional.rms_norm(x, self.factors.shape, self.factors, self.spec.epsilon)
        return apply_norm(x, self.factors, self.spec)


class FusedMLP(nn.Module):
    """down(a(gate x) * up x), gate and up as one product.

    Raises:
        UnknownLayerError: see `FusedLinear`.
    """

    def __init__(self, module: Any, spec: MLPSpec, decodes: bool = False) -> None:
        super().__init__()
        self.gate_up = FusedLinear([getattr(module, name) for name in spec.gate_up], decodes)
        self.down = FusedLinear([module.down_proj], decodes)
        self.activation, self.act = spec.activation, activation_of(module)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self.activation is not None:
            active = apply_gate(gate_up, self.activation)
        else:
            gate, up = gate_up.chunk(2, -1)
            active = self.act(gate) * up
        out: Tensor = self.down(active)
        return out


def rotate_projections(
    fused: Tensor, spec: AttentionSpec, norms: Any, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection (tokens, width), each (tokens, heads, size), normalized, rotated.

    `norms` are those of `split_heads`, `cos` and `sin` those of `apply_rotary`.
    """
    interleaved = spec.rotary == "interleaved"
    if spec.rotary is None or spec.qk_norm is not None:
        query, key, value = split_heads(fused, spec, norms)
        if spec.rotary is None:
            return query, key, value
        return apply_rotary(query, cos, sin, interleaved), apply_rotary(key, cos, sin, interleaved), value
    heads = fused.unflatten(-1, (-1, spec.head_size))  # queries and keys are rotated in one call
    rotated = apply_rotary(heads[:, : spec.heads + spec.groups], cos, sin, interleaved)
    query, key = rotated.split([spec.heads, spec.groups], 1)
    return query, key, heads[:, spec.heads + spec.groups :]


def flatten_angles(angles: tuple[Tensor, Tensor], rows: int) -> Angles:
    """Transformers' cosines and sines, (rows or 1, length, rotated) each, for (rows * length) tokens."""
    cos, sin = (part.expand(rows, -1, -1).flatten(0, 1).contiguous() for part in angles)
    return cos, sin


class DecodingAttention(nn.Module):
    """Causal attention over a KV cache, q, k and v as one product; signature and result as in transformers.

    Args:
        norms: of queries and keys; empty where the spec has none.

    Raises:
        UnknownLayerError: see `FusedLinear`.
    """

    def __init__(self, module: Any, spec: AttentionSpec, norms: Sequence[Any]) -> None:
        super().__init__()
        self.qkv = FusedLinear([getattr(module, name) for name in spec.projections], decodes=True)
        self.out = FusedLinear([module.o_proj], decodes=True)
        self.spec, self.layer_idx = spec, module.layer_idx
        self.q_norm: Any
        self.k_norm: Any
        self.q_norm, self.k_norm = norms or (None, None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_options: Any,
    ) -> tuple[Tensor, None]:
        angles = flatten_angles(position_embeddings, len(hidden_states))
        return self.attend(hidden_states, angles, attention_mask, past_key_values), None

    def attend(self, x: Tensor, angles: Angles, mask: Tensor | None, cache: Any) -> Tensor:
        """What `forward` gives of (rows, length, hidden); with a `SlotCache` its step's tokens, (tokens, 1, hidden)."""
        rows, length, _ = x.shape
        fused = self.qkv(x).flatten(0, 1)  # (tokens, width)
        if isinstance(cache, SlotCache) and can_compute(fused, angles[0]):
            attended = self._attend_newest(fused, angles, cache)
        elif isinstance(cache, SlotCache):
            attended = self._attend_slots(rotate_projections(fused, self.spec, self, *angles), cache)
        else:
            attended = self._attend_all(rotate_projections(fused, self.spec, self, *angles), rows, mask, cache)
        out: Tensor = self.out(attended.reshape(rows, length, -1))
        return out

    def _attend_all(self, heads: tuple[Tensor, Tensor, Tensor], rows: int, mask: Tensor | None, cache: Any) -> Tensor:
        """Of queries, keys and values, (tokens, heads, size) each, in that shape, or with rows apart."""
        spec = self.spec
        q, k, v = (part.unflatten(0, (rows, -1)).transpose(1, 2) for part in heads)  # (rows, heads, length, size)
        length = q.shape[2]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if can_compute(*heads) and mask is None and k.shape[2] == length:
            scores = ScoreSpec(spec.scores.scale, None, spec.scores.softcap)
            return PackedAttentionCall(*heads, PackedSequences((length,) * rows), scores).attend()[0]
        return attend_by_torch(q, k, v, mask, spec.scores).transpose(1, 2)

    def _attend_slots(self, heads: tuple[Tensor, Tensor, Tensor], cache: SlotCache) -> Tensor:
        """Of the tokens of a step, (tokens, heads, size); the cache knows whose they are and what each sees."""
        q, k, v = heads
        keys, values = cache.update(k[:, :, None], v[:, :, None], self.layer_idx)  # (slots, groups, columns, size)
        mask = cache.attention_mask(cache.layers[self.layer_idx])
        by_slot = cache.pad_tokens(q).transpose(1, 2)  # (slots, heads, tokens, size)
        return cache.unpad_tokens(attend_by_torch(by_slot, keys, values, mask, self.spec.scores).transpose(1, 2))

    def _attend_newest(self, fused: Tensor, angles: Angles, cache: SlotCache) -> Tensor:
        """As `_attend_slots`, by a kernel in C."""
        q, k, v = (h if are_heads_adjacent(h) else h.contiguous() for h in split_heads(fused, self.spec, self))
        layer, scores = cache.layers[self.layer_idx], self.spec.scores
        window = cache.columns.window if layer.windowed else None
        if window != scores.window:
            scores = replace(scores, window=window)
        if self.spec.rotary is None:
            angles = fused.new_empty(len(fused), 0), fused.new_empty(len(fused), 0)
        return attend_newest_tokens((q, k, v), angles, self.spec.rotary == "interleaved", layer, scores)
