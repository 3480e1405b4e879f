"""What a model's attention modules compute, learned from a pass in which they are listened to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training_lens.models.classes import decoder_of

NAME = "training_lens_listening"
QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))  # apart, or one below the other in one weight
GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
HARMLESS = ("dropout", "scaling", "sliding_window", "position_ids", "use_cache", "cache_position", "is_causal")


@dataclass(frozen=True)
class Heads:
    """An attention's heads: their number, the groups that share keys, their width; what scales and limits them.

    `normed`: queries and keys go through norms of their own, before their positions.
    """

    count: int
    groups: int
    width: int
    scale: float
    window: int | None
    normed: bool


def projections(module: Any, ways: Sequence[Sequence[str]]) -> list[Any]:
    """The projections of a module's input, named in one of the ways; none where it has no such."""
    for names in ways:
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(layer, nn.Module) for layer in found):
            return found
    return []


def attentions_of(model: Any) -> list[Any]:
    """The attention modules, in the model's order."""
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def heads_of(model: Any, modules: Sequence[Any]) -> dict[Any, Heads] | str:
    """The heads of each of the attention modules; or why a line of examples cannot go through them."""
    if any(getattr(m, "attention_dropout", 0.0) for m in modules):
        return "attention with dropout"
    try:
        heard = _heard(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        return "attention that cannot be listened to"
    if set(heard) != set(modules) or not all(isinstance(heads, Heads) for heads in heard.values()):
        return "attention with more than scale and window"
    return {module: heads for module, heads in heard.items() if isinstance(heads, Heads)}


@torch.no_grad()
def _heard(model: Any) -> dict[Any, Heads | None]:
    """What each attention gives to the function that attends, in a pass of a few tokens; None: more than we know."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    heard: dict[Any, Heads | None] = {}

    def listen(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **told: Any) -> tuple[Tensor, None]:
        strange = [k for k, v in told.items() if k not in HARMLESS and v is not None and v is not False]
        plain = value.shape == key.shape and not strange
        normed = hasattr(module, "q_norm") and hasattr(module, "k_norm")
        scale = told.get("scaling") or query.shape[-1] ** -0.5
        sizes = query.shape[1], key.shape[1], query.shape[-1]
        heard[module] = Heads(*sizes, float(scale), told.get("sliding_window"), normed) if plain else None
        return query.transpose(1, 2).contiguous(), None

    decoder = decoder_of(model)
    before, was_training = decoder.config._attn_implementation, decoder.training
    ALL_ATTENTION_FUNCTIONS[NAME] = listen
    try:
        decoder.eval().config._attn_implementation = NAME
        decoder(input_ids=torch.tensor([[2, 3]], device=next(decoder.parameters()).device), use_cache=False)
    finally:
        decoder.train(was_training).config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NAME]
    return heard
