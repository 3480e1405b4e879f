"""Long-rope rotary embeddings (arXiv 2402.13753) for examples that share a forward pass.

Such a model has two sets of factors: one for sequences of up to `original_max_position_embeddings` tokens, one for
longer ones. transformers chooses by the largest position of the whole batch, so an example's values would depend on
what it is packed or padded with. Here each example has the factors that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

LONG_ROPE = "longrope"


class LongRope:
    """The forward pass of a long-rope module, whose factors are chosen for each example of the batch.

    An example starts where a row starts and at each position 0. Its length is its largest position plus 1, so in
    decoding it includes the tokens in the KV cache.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, x: Tensor, position_ids: Int[Tensor, "rows width"], *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (rows, width, size). Cost: the module computes twice; no device sync."""
        limit = original_length(self.module, *args, *options.values())
        if limit is None:
            return self._forward(x, position_ids, *args, **options)
        is_long = (example_lengths(position_ids) > limit)[..., None]  # (rows, width, 1)
        short = self._forward(x, position_ids.clamp_max(limit - 1), *args, **options)
        beyond = torch.full_like(position_ids[:, :1], limit)  # one more position, which makes the module choose
        long = self._forward(x, torch.cat([position_ids, beyond], 1), *args, **options)
        cos, sin = (torch.where(is_long, b[:, :-1], a) for a, b in zip(short, long, strict=True))
        return cos, sin

    def _forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        cos, sin = type(self.module).forward(self.module, *args, **options)
        return cos, sin


def example_lengths(position_ids: Int[Tensor, "rows width"]) -> Int[Tensor, "rows width"]:
    """The length of each token's example: its largest position plus 1."""
    begins = position_ids == 0
    begins[:, 0] = True
    index = begins.flatten().cumsum(0) - 1  # of each token's example, over all rows
    positions = position_ids.flatten()
    largest = torch.zeros_like(positions).scatter_reduce(0, index, positions, "amax")
    return largest[index].view_as(position_ids) + 1


def original_length(module: nn.Module, *layer_types: Any) -> int | None:
    """The sequence length above which a rotary module uses its long factors; None: it has one set of factors.

    `layer_types` has the kind of layer, where the module has parameters for each kind.
    """
    rope: Any = getattr(getattr(module, "config", None), "rope_parameters", None)
    for name in layer_types:
        rope = rope.get(name, rope) if isinstance(rope, dict) and isinstance(name, str) else rope
    if not isinstance(rope, dict) or rope.get("rope_type") != LONG_ROPE:
        return None
    return int(rope["original_max_position_embeddings"])


def separate_examples(model: Any) -> Any:
    """Make long-rope modules compute each example of a batch as if it were alone; changes the model in place."""
    for module in rotary_modules(model):
        if not isinstance(module.__dict__.get("forward"), LongRope):
            module.forward = LongRope(module)
    return model


def rotary_modules(model: Any) -> list[nn.Module]:
    """The model's rotary modules that have long-rope factors."""
    return [m for m in model.modules() if LONG_ROPE in _rope_types(m).values()]


def longest_short_sequence(model: Any) -> int | None:
    """The longest sequence that keeps the short factors; None: the model has one set of factors."""
    kinds = [(module, name) for module in rotary_modules(model) for name in _rope_types(module)]
    limits = [limit for module, name in kinds if (limit := original_length(module, name)) is not None]
    return min(limits, default=None)


def _rope_types(module: Any) -> dict[str | None, Any]:
    """The module's rotary embedding by the kind of layer, or by None where all layers have one."""
    kinds = getattr(module, "rope_type", None)
    return kinds if isinstance(kinds, dict) else {None: kinds}


def padded_positions(
    model: Any, lengths: Sequence[int] | Tensor, width: int, device: torch.device
) -> dict[str, Tensor]:
    """`position_ids` for right-padded rows, as a keyword argument; empty for models without long-rope factors.

    Padding has position 0, so that it belongs to no example. Without `lengths` no row is padded.
    """
    if not len(lengths) or longest_short_sequence(model) is None:
        return {}
    places = torch.arange(width, device=device).expand(len(lengths), -1)
    return {"position_ids": places.masked_fill(places >= torch.as_tensor(lengths, device=device)[:, None], 0)}
