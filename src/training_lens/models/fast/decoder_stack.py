"""A whole pass of a plain decoder through decoding's layers, without what transformers does between its own.

A plain decoder is x + attention(norm x), then x + mlp(norm x), block by block, and the output layer of a last norm. Its
parts say whether a model may be one; whether it does more (scaled embeddings or sums, say), `decoder` finds out by
comparing the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from training_lens.models.fast.decoding_layers import DecodingAttention, DecodingMLP, DecodingNorm, RotaryAngles
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.kv_cache import FULL, SLIDING
from training_lens.models.model_classes import decoder_of

PARTS = {
    "input_layernorm": DecodingNorm,
    "self_attn": DecodingAttention,
    "post_attention_layernorm": DecodingNorm,
    "mlp": DecodingMLP,
}


@dataclass(frozen=True)
class DecoderBlock:
    """x + attention(norm x), then the same with the MLP. `kind` is that of its mask."""

    before: DecodingNorm
    attention: DecodingAttention
    between: DecodingNorm
    mlp: DecodingMLP
    kind: str


@dataclass(frozen=True)
class DecoderStack:
    """The blocks between embedding and output layer. `rotary` gives cosines and sines of positions."""

    embed: nn.Embedding
    rotary: Any
    blocks: tuple[DecoderBlock, ...]
    norm: DecodingNorm
    head: FusedLinear

    def logits(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor] | None, cache: Cache) -> Tensor:
        """As `Decoder.logits`."""
        x = self.embed(ids)  # (rows, tokens, hidden)
        angles = RotaryAngles(*self.rotary(x, positions))
        for block in self.blocks:
            mask = None if masks is None else masks[block.kind]
            x.add_(block.attention.attend(block.before(x), angles, mask, cache))
            x.add_(block.mlp(block.between(x)))
        scores: Tensor = self.head(self.norm(x[:, -1]))
        return scores


def build_stack(model: Any, windows: Sequence[int | None]) -> DecoderStack | None:
    """The stack of a model whose layers were replaced; None where it has other parts, or hooks.

    Args:
        windows: of each layer, None for one that sees all.
    """
    decoder, head = decoder_of(model), model.get_output_embeddings()
    children = dict(decoder.named_children())
    if children.keys() != {"embed_tokens", "layers", "norm", "rotary_emb"} or any(map(_is_hooked, model.modules())):
        return None
    known = type(children["embed_tokens"]) is nn.Embedding and isinstance(children["norm"], DecodingNorm)
    found = [_build_block(layer, window) for layer, window in zip(children["layers"], windows, strict=False)]
    plain = tuple(block for block in found if block)
    if not known or not isinstance(head, FusedLinear) or len(plain) < len(children["layers"]):
        return None
    return DecoderStack(children["embed_tokens"], children["rotary_emb"], plain, children["norm"], head)


def _build_block(layer: Any, window: int | None) -> DecoderBlock | None:
    children = {name: child for name, child in layer.named_children() if type(child) is not nn.Dropout}
    if children.keys() != PARTS.keys() or not all(isinstance(children[name], kind) for name, kind in PARTS.items()):
        return None
    before, attention, between, mlp = (children[name] for name in PARTS)
    return DecoderBlock(before, attention, between, mlp, FULL if window is None else SLIDING)


def _is_hooked(module: Any) -> bool:
    """Whether its call does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
