"""A whole pass of a decoder through decoding's layers, without what transformers does between its own.

A block adds an attention's output and an MLP's to the residual stream; which norms stand before and after each is known
by the names of its parts. Whether a model does more than its parts say, `decoder` finds out by comparing the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from training_lens.models.fast.fused_layers import Angles, DecodingAttention, DecodingNorm, FusedMLP, flatten_angles
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.kv_cache import FULL, SLIDING
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.model_classes import decoder_of

NORM_PLACES = (  # names of the norms before attention, after it, before the MLP, and after that; "" for none
    ("input_layernorm", "", "post_attention_layernorm", ""),  # Llama
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma
    ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),  # OLMo 2
    ("input_layernorm", "", "", ""),  # Cohere: attention and MLP take the same input
)


@dataclass(frozen=True)
class DecoderBlock:
    """One layer of a decoder."""

    norms: tuple[DecodingNorm | None, ...]  # where `NORM_PLACES` says
    attention: DecodingAttention
    mlp: FusedMLP
    kind: str  # of its mask
    factor: float  # by which the branches' outputs are multiplied before they are added

    def add_branches(self, x: Tensor, angles: Angles, mask: Tensor | None, cache: Cache) -> None:
        """Add the outputs of attention and MLP to x, (rows, tokens, hidden), in place."""
        before, after, between, behind = self.norms
        given = before(x) if before else x
        is_parallel = before is not None and after is between is behind is None
        self._add(x, self.attention.attend(given, angles, mask, cache), after)
        if not is_parallel:
            given = between(x) if between else x
        self._add(x, self.mlp(given), behind)

    def _add(self, x: Tensor, branch: Tensor, norm: DecodingNorm | None) -> None:
        if norm:
            branch = norm(branch)
        x.add_(branch if self.factor == 1 else branch * self.factor)


@dataclass(frozen=True)
class DecoderStack:
    """The blocks between embedding and output layer."""

    embed: nn.Embedding
    rotary: Any  # gives cosines and sines of positions
    blocks: tuple[DecoderBlock, ...]
    norm: DecodingNorm
    head: FusedLinear
    embedding_factor: float  # embeddings are multiplied by it, and logits by the next
    logit_factor: float
    softcap: float | None  # of logits: softcap tanh(logits / softcap)
    rotates_by_kind: bool  # whether `rotary` takes the kind of layer, as Gemma 3's does

    def logits(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor] | None, cache: Cache) -> Tensor:
        """As `Decoder.logits`."""
        x = self.embed(ids)  # (rows, tokens, hidden)
        if self.embedding_factor != 1:
            x = x * self.embedding_factor
        kinds = dict.fromkeys(block.kind for block in self.blocks)
        if self.rotates_by_kind:
            angles = {kind: flatten_angles(self.rotary(x, positions, kind), len(ids)) for kind in kinds}
        else:
            angles = dict.fromkeys(kinds, flatten_angles(self.rotary(x, positions), len(ids)))
        for block in self.blocks:
            block.add_branches(x, angles[block.kind], None if masks is None else masks[block.kind], cache)
        scores: Tensor = self.head(self.norm(x[:, -1]))
        if self.logit_factor != 1:
            scores = scores * self.logit_factor
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap


def build_stack(model: Any, windows: Sequence[int | None]) -> DecoderStack:
    """The stack of a model whose layers were replaced.

    Args:
        windows: of each layer, None for one that sees all.

    Raises:
        UnknownLayerError: it has other parts, or hooks.
    """
    decoder, head, config = decoder_of(model), model.get_output_embeddings(), model.config.get_text_config()
    children = dict(decoder.named_children())
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()):
        raise UnknownLayerError("modules with hooks or a forward of their own")
    if children.keys() != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        raise UnknownLayerError(f"a {type(decoder).__name__} of other parts than embedding, layers, norm and rotary")
    if not isinstance(children["norm"], DecodingNorm) or not isinstance(head, FusedLinear):
        raise UnknownLayerError("a last norm or an output layer that decodes by itself")
    blocks = [_build_block(layer, window) for layer, window in zip(children["layers"], windows, strict=True)]
    return DecoderStack(
        children["embed_tokens"], children["rotary_emb"], tuple(blocks), children["norm"], head,
        embedding_factor=getattr(decoder, "embedding_multiplier", 1.0),
        logit_factor=getattr(model, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        rotates_by_kind="layer_type" in inspect.signature(children["rotary_emb"].forward).parameters,
    )  # fmt: skip


def _build_block(layer: Any, window: int | None) -> DecoderBlock:
    children = {name: child for name, child in layer.named_children() if type(child) is not nn.Dropout}
    attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
    places = next((places for places in NORM_PLACES if {*filter(None, places)} == children.keys()), None)
    if places is None:
        raise UnknownLayerError(f"a {type(layer).__name__} of unknown parts")
    norms = tuple(children[name] if name else None for name in places)
    known = all(norm is None or isinstance(norm, DecodingNorm) for norm in norms)
    if not (known and isinstance(attention, DecodingAttention) and isinstance(mlp, FusedMLP)):
        raise UnknownLayerError(f"a {type(layer).__name__} with parts that decode by themselves")
    kind = FULL if window is None else SLIDING
    return DecoderBlock(norms, attention, mlp, kind, getattr(layer, "residual_multiplier", 1.0))
