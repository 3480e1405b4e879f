"""PiSSA (arXiv 2404.02948) on an unchanged base: a LoRA of twice the rank whose second half is frozen.

PiSSA trains A and B from the largest singular directions, W ~ s B0 A0, on the base W - s B0 A0. The same sum with the
base untouched:

    (W - s B0 A0) + s B A = W + s [B, -B0] [A; A0]

which is a LoRA [out, 2r] x [2r, in] that any PEFT loads and can switch off, and that equals the base at its start.
Dropout on its input is the same for both halves, so it adds no noise at the start.
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


def concatenate_halves(trained: Tensor, frozen: Tensor, dim: int) -> Tensor:
    """The whole weight: A (dim 0) (r, in) -> (2r, in), B (dim 1) (out, r) -> (out, 2r)."""
    return torch.cat([trained, frozen], dim)


def split_halves(linear: Any) -> tuple[Any, Tensor]:
    """The trained and the frozen half of a layer's weight, as stored."""
    weight = linear.parametrizations.weight
    return weight.original, weight[0].frozen


class HalfFrozen(torch.nn.Module):
    """A weight whose first half along `dim` is trained and whose second half is frozen."""

    frozen: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("frozen", torch.empty(0))

    def forward(self, trained: Tensor) -> Tensor:
        return concatenate_halves(trained, self.frozen, self.dim)

    def right_inverse(self, whole: Tensor) -> Tensor:
        """Split an assigned weight."""
        trained, frozen = whole.detach().chunk(2, self.dim)
        self.frozen = frozen.clone()
        return trained.clone()


def double_rank(peft: PeftSection) -> dict[str, Any]:
    """Rank and alpha, with their patterns, of the LoRA of twice the rank; its scale is that of the configured rank."""
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


def start_from_principal_halves(adapted: Any) -> None:
    """Turn a fresh LoRA of twice the rank into PiSSA, layer by layer. Cost: one truncated SVD a layer."""
    from peft.tuners.lora import LoraLayer

    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            (name,) = layer.lora_A.keys()
            weight = layer.get_base_layer().weight.detach()
            weight = weight.T if layer.fan_in_fan_out else weight
            a, b = principal_halves(weight, layer.r[name] // 2, layer.scaling[name])
            _freeze_half(layer.lora_A[name], concatenate_halves(a, a, 0), dim=0)
            _freeze_half(layer.lora_B[name], concatenate_halves(b, -b, 1), dim=1)


def _freeze_half(linear: torch.nn.Module, weight: Tensor, dim: int) -> None:
    linear.weight = torch.nn.Parameter(weight)
    parametrize.register_parametrization(linear, "weight", HalfFrozen(dim))
    linear.register_state_dict_post_hook(_save_whole_weight)
    linear.register_load_state_dict_pre_hook(_split_halves_on_load)


def _save_whole_weight(linear: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Save the whole weight under its plain name."""
    for key in [key for key in state if key.startswith(f"{prefix}parametrizations.")]:
        del state[key]
    state[f"{prefix}weight"] = linear.weight.detach()


def _split_halves_on_load(linear: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Split the whole weight, which is loaded under its plain name."""
    whole = state.pop(f"{prefix}weight", None)
    if whole is not None:
        trained, frozen = whole.chunk(2, linear.parametrizations.weight[0].dim)
        state[f"{prefix}parametrizations.weight.original"] = trained
        state[f"{prefix}parametrizations.weight.0.frozen"] = frozen
