"""Layers as decoding wants them: joined products, few passes over small tensors, attention without copied heads.

Each computes what a layer of a transformers model does. Which may stand for which is `replacing`'s to decide: by
structure, and by comparing their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training_lens.models.fast.kernels import activation_name
from training_lens.models.fast.kv_cache import SlotCache
from training_lens.models.fast.native import training_kernels as native
from training_lens.models.fast.native.attention_kernels import PackedLayout
from training_lens.models.fast.native.attention_kernels import attend_packed as attend_line
from training_lens.models.fast.native.decoding_kernels import FewRowsLinear, LoRABranches, attend_newest_token
from training_lens.models.fast.native.library import are_heads_adjacent, can_compute


@dataclass(frozen=True)
class LinearWeights:
    """x W^T + b, and (x A^T) B^T besides where an adapter is kept beside the weight; B holds the adapter's scale.

    Shapes: weight (out, in), bias (out,), down A (rank, in), up B (out, rank).
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None


class DecodingLinear(nn.Module):
    """Several linear layers on one input as one product, their outputs side by side: (..., in) to (..., sum of outs).

    Costs a copy of the weights. On a CPU that oneDNN computes bfloat16 on, the copy is in the order in which its
    kernels read it, which plain weights are brought to anew at every call. Where few rows are computed from the plain
    weights, these stay, too.
    """

    def __init__(self, parts: Sequence[LinearWeights]) -> None:
        super().__init__()
        weight = torch.cat([part.weight for part in parts])
        self.width, self.packed = weight.shape[1], _is_packable(weight)
        self.weight = _reorder_weight(weight) if self.packed else weight
        self.bias = _concatenate_biases(parts)
        plain = [part.weight.detach() for part in parts]
        self.few = FewRowsLinear(plain, self.bias) if FewRowsLinear.can_compute(plain, self.bias) else None
        self.down, self.up, self._branches = None, None, None
        if any(part.down is not None for part in parts):
            factors = _adapter_factors(parts)
            if can_compute(weight):
                self._branches = LoRABranches(factors, weight.dtype)
            else:
                self.down = torch.cat([down for down, _ in factors]).float()
                self.up = torch.block_diag(*(up for _, up in factors)).float()

    @property
    def has_adapter(self) -> bool:
        """Whether one is computed beside the weights."""
        return self._branches is not None or self.down is not None

    def forward(self, x: Tensor) -> Tensor:
        are_few = 0 < x.numel() <= FewRowsLinear.MOST * self.width
        out = self.few(x) if self.few and are_few else self.apply_to_many_rows(x)
        if self._branches and x.numel():
            self._branches.add_to(x.flatten(0, -2), out.flatten(0, -2))
        elif self.down is not None and self.up is not None:  # in float32 until the sum is rounded, as PEFT computes
            low = functional.linear(x.float(), self.down)  # (..., sum of ranks)
            out = (out + functional.linear(low, self.up)).to(out.dtype)
        return out

    def apply_to_many_rows(self, x: Tensor) -> Tensor:
        """x W^T + b as it is computed for many rows."""
        if self.packed:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        return functional.linear(x, self.weight, self.bias)


def _adapter_factors(parts: Sequence[LinearWeights]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each, without ranks where it has no adapter."""
    nothing = [
        (part.weight.new_zeros(0, part.weight.shape[1]), part.weight.new_zeros(len(part.weight), 0)) for part in parts
    ]
    return [
        none if part.down is None or part.up is None else (part.down, part.up)
        for part, none in zip(parts, nothing, strict=True)
    ]


def _is_packable(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _reorder_weight(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _concatenate_biases(parts: Sequence[LinearWeights]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts])


class DecodingNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight (arXiv 1910.07467), in one call.

    Args:
        weight: (size,), with Gemma's 1 added.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        if can_compute(x, self.weight):
            return native.rms_norm(x, self.weight, self.eps)[0]
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DecodingMLP(nn.Module):
    """down(act(gate x) * up x), gate and up as one product."""

    def __init__(self, gate_up: DecodingLinear, down: DecodingLinear, act: Any) -> None:
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


@dataclass(frozen=True)
class DecodingHeads:
    """Sizes of an attention layer; `softcap` bounds its scores to +-softcap by tanh (arXiv 2408.00118)."""

    queries: int
    keys: int
    size: int
    scaling: float
    softcap: float | None


class DecodingAttention(nn.Module):
    """Causal attention with rotary positions, q, k and v as one product; signature and result as in transformers.

    Args:
        norms: of q and k, where the model has them.
    """

    def __init__(
        self,
        qkv: DecodingLinear,
        out: DecodingLinear,
        heads: DecodingHeads,
        norms: tuple[Any, Any] | None,
        layer_idx: int,
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.layer_idx = qkv, out, heads, layer_idx
        self.norms = nn.ModuleList(norms) if norms else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_options: Any,
    ) -> tuple[Tensor, None]:
        return self.attend(hidden_states, RotaryAngles(*position_embeddings), attention_mask, past_key_values), None

    def attend(self, x: Tensor, turn: RotaryAngles, mask: Tensor | None, cache: Any) -> Tensor:
        """What `forward` gives of (rows, length, hidden)."""
        rows, length, _ = x.shape
        heads = self.heads
        qkv = self.qkv(x).view(rows, length, heads.queries + 2 * heads.keys, heads.size)
        q, k, v = qkv.split([heads.queries, heads.keys, heads.keys], dim=2)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if length == 1 and isinstance(cache, SlotCache) and heads.softcap is None and turn.can_compute(q, k, v):
            mixed = self._attend_newest(q[:, 0], k[:, 0], v[:, 0], turn, cache)
        else:
            mixed = self._attend_all(turn(q), turn(k), v, mask, cache)
        out: Tensor = self.out(mixed.reshape(rows, length, heads.queries * heads.size))
        return out

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Of (rows, length, heads, size) each, in that shape, or with rows and length in one."""
        rows, length, *_ = q.shape
        keys, values = k.transpose(1, 2), v.transpose(1, 2)  # (rows, heads, length, size)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        if self.heads.softcap is None and can_compute(q, k, v) and mask is None and keys.shape[2] == length:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            return attend_line(q, k, v, PackedLayout((length,) * rows), self.heads.scaling, None)[0]
        return attend_packed(q.transpose(1, 2), keys, values, mask, self.heads)

    def _attend_newest(self, q: Tensor, k: Tensor, v: Tensor, turn: RotaryAngles, cache: SlotCache) -> Tensor:
        """Of one token a row, each (rows, heads, size); what a row sees, the mask would say as well."""
        layer, columns = cache.layers[self.layer_idx], cache.columns
        keys, values = layer.allocate(k, v)
        window = columns.window if layer.windowed else None
        places = turn.expand_to_rows(len(q))
        return attend_newest_token(q, k, v, places, keys, values, columns.seen, columns.end, self.heads.scaling, window)


@dataclass(frozen=True)
class RotaryAngles:
    """Rotary positions (arXiv 2104.09864) of some tokens: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of halves.

    `cos` and `sin` are (rows or 1, length, size), as transformers has them.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Of (rows, length, heads, size), rounded where transformers rounds."""
        if not self.can_compute(x):
            cos, sin = self._signed_angles
            return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))
        tokens = x.flatten(0, 1)
        turned = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        native.rotate_heads(tokens, *self.expand_to_rows(len(x)), 1.0, turned)
        return turned.view(x.shape)

    def can_compute(self, *tensors: Tensor) -> bool:
        """Whether a kernel can: of (rows, length, heads, size) each, a token's heads one behind the other."""
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


def attend_packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: DecodingHeads) -> Tensor:
    """Softmax(q k^T) v, (rows, length, query heads, size).

    Args:
        q: (rows, query heads, length, size); k, v: (rows, key heads, columns, size).
        mask: added to the scores, or what may be seen (bool), (rows or 1, 1, length, columns); None is causal.
    """
    rows, _, length, size = q.shape
    group = heads.queries // heads.keys
    if length == 1:  # the heads that share a key stand where several tokens would: no key is copied
        q = q.reshape(rows, heads.keys, group, size)
    elif group > 1:
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    if heads.softcap is None:
        causal = mask is None and length > 1
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=heads.scaling)
    else:
        mixed = _attend_with_softcap(q, k, v, mask if mask is not None or length == 1 else causal_mask(q), heads)
    if length == 1:
        return mixed.reshape(rows, 1, heads.queries, size)
    return mixed.transpose(1, 2)


def causal_mask(q: Tensor) -> Tensor:
    """What each of the tokens may see of the others, (length, length) bool."""
    length = q.shape[-2]
    return torch.ones(length, length, dtype=torch.bool, device=q.device).tril()


def _attend_with_softcap(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: DecodingHeads) -> Tensor:
    cap = heads.softcap
    assert cap is not None
    scores = cap * torch.tanh(torch.matmul(q, k.transpose(-1, -2)) * heads.scaling / cap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
