"""PiSSA (arXiv 2404.02948) that leaves the base as it is: a LoRA of twice the rank whose second half is frozen.

PiSSA trains A and B from the largest singular directions, W ~ s B0 A0, on the base W - s B0 A0. The same sum with the
base untouched:

    (W - s B0 A0) + s B A = W + s [B, -B0] [A; A0]

which is a LoRA [out, 2r] x [2r, in] that any PEFT loads, equals the base at its start, and is switched off like any
other. Dropout on its input draws the same for both halves, so it adds no noise at the start either.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from training_lens.config.schema import PeftSection

ITERATIONS = 16  # of the subspace iteration, as in the paper's most exact "fast SVD"
OVERSAMPLING = 8  # directions beyond the rank, so that those within it converge where singular values lie close


class HalfFrozen(torch.nn.Module):
    """A weight of which the first half along `dim` is trained and the second stays: stacks the two."""

    frozen: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("frozen", torch.empty(0))

    def forward(self, trained: Tensor) -> Tensor:
        return torch.cat([trained, self.frozen], self.dim)  # A: (r, in) -> (2r, in); B: (out, r) -> (out, 2r)

    def right_inverse(self, whole: Tensor) -> Tensor:
        """Take both halves of an assigned weight."""
        trained, frozen = whole.detach().chunk(2, self.dim)
        self.frozen = frozen.clone()
        return trained.clone()


def doubled(peft: PeftSection) -> dict[str, Any]:
    """Rank and alpha, with their patterns, of the LoRA of twice the rank whose scale is that of the rank asked for."""
    alpha = math.sqrt(2) if peft.variant == "rslora" else 2.0
    return {
        "r": 2 * peft.r,
        "lora_alpha": alpha * peft.lora_alpha,
        "rank_pattern": {name: 2 * rank for name, rank in peft.rank_pattern.items()},
        "alpha_pattern": {name: alpha * value for name, value in peft.alpha_pattern.items()},
    }


def principal_halves(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 (rank, in) = diag(sqrt(S / s)) V^T and B0 (out, rank) = U diag(sqrt(S / s)), of `weight` (out, in), float32.

    s B0 A0 is the best approximation of that rank, by subspace iteration (arXiv 0909.4061) from torch's random state.
    """
    u, singular, v = torch.svd_lowrank(weight.float(), min(rank + OVERSAMPLING, *weight.shape), niter=ITERATIONS)
    root = (singular[:rank] / scale).sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def start(adapted: Any) -> None:
    """Turn a fresh LoRA of twice the rank into PiSSA, layer by layer. Cost: one truncated SVD a layer."""
    from peft.tuners.lora import LoraLayer

    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            (name,) = layer.lora_A.keys()
            weight = layer.get_base_layer().weight.detach()
            a, b = principal_halves(
                weight.T if layer.fan_in_fan_out else weight, layer.r[name] // 2, layer.scaling[name]
            )
            _freeze_half(layer.lora_A[name], torch.cat([a, a]), dim=0)
            _freeze_half(layer.lora_B[name], torch.cat([b, -b], 1), dim=1)


def _freeze_half(linear: torch.nn.Module, weight: Tensor, dim: int) -> None:
    linear.weight = torch.nn.Parameter(weight)
    parametrize.register_parametrization(linear, "weight", HalfFrozen(dim))
    linear.register_state_dict_post_hook(_as_one)
    linear.register_load_state_dict_pre_hook(_into_halves)


def _as_one(linear: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Saved is the whole weight under its plain name."""
    for key in [key for key in state if key.startswith(f"{prefix}parametrizations.")]:
        del state[key]
    state[f"{prefix}weight"] = linear.weight.detach()


def _into_halves(linear: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Loaded is the whole weight under its plain name; it is split here."""
    whole = state.pop(f"{prefix}weight", None)
    if whole is not None:
        trained, frozen = whole.chunk(2, linear.parametrizations.weight[0].dim)
        state[f"{prefix}parametrizations.weight.original"] = trained
        state[f"{prefix}parametrizations.weight.0.frozen"] = frozen
