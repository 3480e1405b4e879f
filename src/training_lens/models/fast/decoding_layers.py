"""Layers as decoding computes them: fused linear layers, one pass for small tensors, attention without repeated heads.

Each computes what a layer of a transformers model does. `layer_replacement` puts them in, where results are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.kernels import activation_name, rotate_heads
from training_lens.models.fast.kv_cache import SlotCache
from training_lens.models.fast.layer_spec import AttentionSpec, NormSpec, Rotary, split_heads
from training_lens.models.fast.native import training_kernels as native
from training_lens.models.fast.native.attention_kernels import PackedAttentionCall, PackedLayout, ScoreSpec
from training_lens.models.fast.native.decoding_kernels import CachedTokens, NewestTokens, attend_newest_tokens
from training_lens.models.fast.native.library import are_heads_adjacent, can_compute
from training_lens.models.fast.packed_attention import attend_with_softcap, causal_mask


class DecodingNorm(nn.Module):
    """An RMSNorm or LayerNorm in one call.

    Args:
        weight: (size,), with Gemma's 1 added.
    """

    def __init__(self, weight: Tensor, spec: NormSpec) -> None:
        super().__init__()
        self.weight, self.spec = weight, spec

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "layer":
            return functional.layer_norm(x, self.weight.shape, self.weight, None, self.spec.epsilon)
        if can_compute(x, self.weight):
            return native.rms_norm(x, self.weight, self.spec.epsilon)[0]
        return functional.rms_norm(x, self.weight.shape, self.weight, self.spec.epsilon)


class DecodingMLP(nn.Module):
    """down(act(gate x) * up x), gate and up as one product."""

    def __init__(self, gate_up: FusedLinear, down: FusedLinear, act: Any) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = gate_up, down, act
        self._name = activation_name(act)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self._name in native.ACTIVATIONS and can_compute(gate_up):
            active = native.apply_gate(gate_up, self._name)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            active = self.act(gate).mul_(up)
        out: Tensor = self.down(active)
        return out


class DecodingAttention(nn.Module):
    """Causal attention with rotary embedding, q, k and v as one product; signature and result as in transformers.

    Args:
        norms: of queries and keys; empty where the spec has none.
    """

    def __init__(
        self, qkv: FusedLinear, out: FusedLinear, spec: AttentionSpec, norms: Sequence[Any], layer_idx: int
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.spec, self.layer_idx = qkv, out, spec, layer_idx
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
        return self.attend(hidden_states, RotaryAngles(*position_embeddings), attention_mask, past_key_values), None

    def attend(self, x: Tensor, angles: RotaryAngles, mask: Tensor | None, cache: Any) -> Tensor:
        """What `forward` gives of (rows, length, hidden)."""
        rows, length, _ = x.shape
        spec = self.spec
        q, k, v = split_heads(self.qkv(x), spec, self)
        if length == 1 and isinstance(cache, SlotCache) and can_compute(q, k, v, angles.cos):
            attended = self._attend_newest(q, k, v, angles, cache)
        else:
            attended = self._attend_all(angles.rotate(q, spec.rotary), angles.rotate(k, spec.rotary), v, mask, cache)
        out: Tensor = self.out(attended.reshape(rows, length, spec.heads * spec.head_size))
        return out

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Of (rows, length, heads, size) each, in that shape, or with rows and length in one."""
        rows, length, *_ = q.shape
        keys, values = k.transpose(1, 2), v.transpose(1, 2)  # (rows, heads, length, size)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        if can_compute(q, k, v) and mask is None and keys.shape[2] == length:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            scores = ScoreSpec(self.spec.scores.scale, None, self.spec.scores.softcap)
            return PackedAttentionCall(q, k, v, PackedLayout((length,) * rows), scores).attend()[0]
        return attend_cached(q.transpose(1, 2), keys, values, mask, self.spec)

    def _attend_newest(self, q: Tensor, k: Tensor, v: Tensor, angles: RotaryAngles, cache: SlotCache) -> Tensor:
        """Of one token a row, each (rows, 1, heads, size); the cache knows what a row sees, as the mask does."""
        if self.spec.rotary == "halves":  # the kernel rotates queries and keys
            cos, sin = angles.expand_to_rows(len(q))
        else:
            q, k = angles.rotate(q, self.spec.rotary), angles.rotate(k, self.spec.rotary)
            cos = sin = q.new_empty(len(q), 0)
        q, k, v = (part[:, 0] if are_heads_adjacent(part) else part[:, 0].contiguous() for part in (q, k, v))
        layer, columns, scores = cache.layers[self.layer_idx], cache.columns, self.spec.scores
        window = columns.window if layer.windowed else None
        if window != scores.window:
            scores = replace(scores, window=window)
        keys, values = layer.allocate(k, v)
        cached = CachedTokens(keys, values, columns.seen, columns.end)
        return attend_newest_tokens(NewestTokens(q, k, v, cos, sin), cached, scores)


@dataclass(frozen=True)
class RotaryAngles:
    """Cosines and sines of some tokens for rotary embedding, (rows or 1, length, size) each, as in transformers."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """`kernels.apply_rotary` of (rows, length, heads, size), rounded where transformers rounds."""
        if rotary is None:
            return x
        if rotary == "interleaved":
            return rotate_heads(x.flatten(0, 1), *self.expand_to_rows(len(x)), 1.0, interleaved=True).view(x.shape)
        rotated = self.cos.shape[-1]
        if not self.can_rotate(x):
            cos, sin = self._signed_angles
            turning = x[..., :rotated]
            turned = (turning * cos).add_(turning.roll(rotated // 2, -1).mul_(sin))
            return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], -1)
        tokens = x.flatten(0, 1)
        out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        native.rotate_heads(tokens, *self.expand_to_rows(len(x)), 1.0, out)
        return out.view(x.shape)

    def can_rotate(self, *tensors: Tensor) -> bool:
        """Whether a kernel can rotate halves: of (rows, length, heads, size) each, a token's heads adjacent."""
        whole = all(self.cos.shape[-1] <= t.shape[-1] and are_heads_adjacent(t) for t in tensors)
        return whole and can_compute(*tensors, self.cos, self.sin)

    def expand_to_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (rows * length, size) each."""
        if rows == len(self.cos):
            return self._token_angles
        cos, sin = (t.repeat(rows, 1) for t in self._token_angles)
        return cos, sin

    @cached_property
    def _token_angles(self) -> tuple[Tensor, Tensor]:
        """Both (own rows * length, size), dense."""
        return self.cos.flatten(0, 1).contiguous(), self.sin.flatten(0, 1).contiguous()

    @cached_property
    def _signed_angles(self) -> tuple[Tensor, Tensor]:
        """Both (rows or 1, length, 1, size), with the sines' signs."""
        first, second = self.sin.chunk(2, dim=-1)
        return self.cos[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> Tensor:
    """softmax(s) v by torch, (rows, length, heads, size); `ScoreSpec` defines s.

    Args:
        q: (rows, heads, length, size); k, v: (rows, groups, columns, size).
        mask: added to the scores, or what may be seen (bool), (rows or 1, 1, length, columns); None is causal.
    """
    rows, _, length, size = q.shape
    group, scores = spec.heads // spec.groups, spec.scores
    if length == 1:  # the heads that share a key stand where several tokens would: no key is copied
        q = q.reshape(rows, spec.groups, group, size)
    elif group > 1:
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    causal = mask is None and length > 1
    if scores.softcap is None:
        attended = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scores.scale)
    else:
        attended = attend_with_softcap(q, k, v, causal_mask(length, None, q.device) if causal else mask, scores)
    if length == 1:
        return attended.reshape(rows, 1, spec.heads, size)
    return attended.transpose(1, 2)
