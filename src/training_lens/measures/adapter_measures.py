"""The norms and ranks of an adapter, as the tables `adapter_weights` and `spectra` name them.

Captures during training, saved checkpoints and single adapters are all measured here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training_lens.measures.factors import Factors, Grams, norm_from_gram, to_float32
from training_lens.measures.singular_values import (
    balance,
    effective_rank,
    energy_rank,
    singular_values,
    stable_rank,
    step_norm,
    top_ratio,
    update_norm,
    update_norm_from_grams,
)


def adapter_norms(
    trained: Factors, scaling: float, full: Factors | None, before: Factors | None = None
) -> dict[str, Tensor]:
    """norm_a, norm_b, norm_update, norm_step and balance, each (*batch,).

    Args:
        before: `trained` before the step, for norm_step; None: unknown, and norm_step is NaN.
        full: the factors of dW where they may cancel, as PiSSA's do: norm_update is then computed from these in
            float64. None: from `trained`, in its own precision.
    """
    grams = Grams.from_factors(to_float32(trained.a), to_float32(trained.b))
    return {
        "norm_a": norm_from_gram(grams.a),
        "norm_b": norm_from_gram(grams.b),
        "norm_update": update_norm_from_grams(grams, scaling) if full is None else update_norm(full.a, full.b, scaling),
        "norm_step": trained.a.new_full(trained.a.shape[:-2], torch.nan)
        if before is None
        else step_norm(before.a, before.b, trained.a, trained.b, scaling),
        "balance": balance(grams),
    }


def update_spectrum(full: Factors, trained: Factors, scaling: float) -> dict[str, Tensor]:
    """singular_values (*batch, k) of dW, and effective_rank, stable_rank, energy_rank and top_ratio, each (*batch,).

    `full` are the factors of dW; `top_ratio` is that of `trained`. Cost: two QR decompositions and an SVD in rank
    dimensions; waits for the device on CUDA.
    """
    singular = singular_values(full.a, full.b, scaling)
    return {
        "singular_values": singular,
        "effective_rank": effective_rank(singular),
        "stable_rank": stable_rank(singular),
        "energy_rank": energy_rank(singular),
        "top_ratio": top_ratio(trained.a, trained.b),
    }
