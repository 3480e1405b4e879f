"""Weights that no model should have: NaN, infinite, or all zero. Looked for only once something went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from training_lens.utils.formatting import list_names

SHOWN = 3


def find_nonfinite_weights(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and weights with a NaN or an infinity, in the model's order. Cost: a sync point a weight."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            yield name, weight


def describe_broken_weights(model: Any) -> str:
    """A sentence on the model's weights that are not finite, '' if all are; says whose they are."""
    found = list(find_nonfinite_weights(model))
    if not found:
        return ""
    of_base = [(name, weight) for name, weight in found if "lora_" not in name and not weight.requires_grad]
    name, weight = (of_base or found)[0]
    bad = int((~torch.isfinite(weight)).sum())
    more = f", and {len(of_base or found) - 1} weights more" if len(of_base or found) > 1 else ""
    whose = "the base is broken, and no row or learning rate is to blame: load it anew" if of_base else (
        "the adapter broke in an earlier step: lower training.lr"
    )  # fmt: skip
    return f"The weight {name} holds {bad:,} values of {weight.numel():,} that are NaN or infinite{more}; {whose}."


def find_zero_weights(model: Any) -> list[str]:
    """The names of the base's matrices that are all zero, so that no gradient passes them."""
    matrices = ((n, w) for n, w in model.named_parameters() if w.ndim > 1 and not w.requires_grad and "lora_" not in n)
    return [name for name, weight in matrices if not bool(weight.any())]


def describe_zero_weights(model: Any) -> str:
    """A sentence on the base's matrices that are all zero, '' if there is none."""
    found = find_zero_weights(model)
    return f"All zero in the base: {list_names(found, SHOWN)}. Load a base whose weights are there." if found else ""
