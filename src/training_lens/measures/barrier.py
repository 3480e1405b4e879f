"""Interpolation between two updates, the loss barrier between them, and the best update of a smaller rank."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.measures.factors import to_float32
from training_lens.measures.singular_values import singular_vectors

FactorPair = tuple[Tensor, Tensor]  # A (*batch, rank, in) and B (*batch, out, rank)


def interpolate_updates(first: FactorPair, second: FactorPair, alpha: float) -> FactorPair:
    """Exact factors (A, B) of alpha dW1 + (1 - alpha) dW2, for two updates with one scaling.

    Formula: B = [alpha B1, (1 - alpha) B2] and A = [A1; A2]; the ranks add up. Averaging A with A and B with B would
    give cross terms. Float32 or better.
    """
    (a1, b1), (a2, b2) = first, second
    a = torch.cat([to_float32(a1), to_float32(a2)], -2)
    return a, torch.cat([alpha * to_float32(b1), (1 - alpha) * to_float32(b2)], -1)


def loss_barrier(alphas: Float[Tensor, " points"], losses: Float[Tensor, "*batch points"]) -> Float[Tensor, "*batch"]:
    """How far the loss between two checkpoints rises above the line between its ends; 0 if it never does.

    Formula: max over alpha of L(alpha) - [(1 - t) L(first) + t L(last)], t the alpha's position between the smallest
    and the largest one (Frankle et al. 2020, arXiv 1912.05671). The ends are included, so a convex loss gives 0.

    Example:
        >>> loss_barrier(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([2.0, 3.5, 3.0]))
        tensor(1.)
    """
    order = alphas.argsort()
    alphas, losses = to_float32(alphas)[order], to_float32(losses)[..., order]
    position = (alphas - alphas[0]) / (alphas[-1] - alphas[0])
    return (losses - torch.lerp(losses[..., :1], losses[..., -1:], position)).amax(-1)


def truncate_rank(
    a: Float[Tensor, "*batch rank inputs"], b: Float[Tensor, "*batch outputs rank"], scaling: float, rank: int
) -> tuple[Float[Tensor, "*batch rank inputs"], Float[Tensor, "*batch outputs rank"]]:
    """Factors A', B' of the best approximation of dW = s B A of a smaller rank, padded to the old shapes.

    Formula: A' = diag(sqrt(sigma / |s|)) V^T and B' = U diag(sqrt(sigma / |s|)) sign(s) of the first `rank` singular
    directions (Eckart and Young 1936), the rest zeros. ||dW - s B' A'||_F^2 is the sum of the dropped sigma^2. Float64.

    Args:
        scaling: s, not 0.
    """
    u, singular, v = singular_vectors(a, b, scaling)
    root = (singular[..., None, :rank] / abs(scaling)).sqrt()
    sign = -1 if scaling < 0 else 1
    left, right = sign * u[..., :rank] * root, v[..., :rank] * root
    padding = (0, a.shape[-2] - left.shape[-1])  # of the last dimension
    return torch.nn.functional.pad(right, padding).mT, torch.nn.functional.pad(left, padding)
