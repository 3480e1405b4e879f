"""How similar two adapters, or two steps of one, are: their subspaces, principal angles, and updates.

Leading dimensions, `*batch`, are modules of one shape. Decompositions wait for the device on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.measures.factors import nan_safe_svd, nan_safe_svdvals, to_float64, update_inner_product
from training_lens.measures.singular_values import singular_vectors, update_norm


def subspace_similarity(
    a1: Float[Tensor, "*batch rank1 inputs"], a2: Float[Tensor, "*batch rank2 inputs"], i: int, j: int
) -> Float[Tensor, "*batch"]:
    """How much of the first i directions of one A lies within the first j of another: 0 nothing, 1 all.

    Formula: phi(i, j) = ||U_i^T U_j||_F^2 / min(i, j) on right singular vectors of A (LoRA, arXiv 2106.09685, section
    7.2, equation 4). For random subspaces it is max(i, j) / in on average. i and j are capped at min(rank, in).
    Cost: a decomposition of each A, O(in rank^2).

    Example:
        >>> subspace_similarity(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0])), 1, 2).item()
        1.0
    """
    first, second = _right_vectors(a1, i), _right_vectors(a2, j)
    return (first.mT @ second).square().sum((-2, -1)) / min(first.shape[-1], second.shape[-1])


def subspace_grid(
    a1: Float[Tensor, "*batch rank1 inputs"], a2: Float[Tensor, "*batch rank2 inputs"], upto: int
) -> Float[Tensor, "*batch rows columns"]:
    """`subspace_similarity` for all i and j from 1 to `upto` (or min(rank, in)): [..., i - 1, j - 1] is phi(i, j)."""
    shared = (_right_vectors(a1, upto).mT @ _right_vectors(a2, upto)).square()  # (*batch, i, j)
    rows, columns = shared.shape[-2:]
    i = torch.arange(1, rows + 1, device=shared.device)[:, None]
    j = torch.arange(1, columns + 1, device=shared.device)
    return shared.cumsum(-2).cumsum(-1) / torch.minimum(i, j)


def _right_vectors(a: Tensor, count: int) -> Tensor:
    return nan_safe_svd(to_float64(a))[2][..., :count]  # (*batch, in, count)


def principal_angles(
    q1: Float[Tensor, "*batch size k1"], q2: Float[Tensor, "*batch size k2"]
) -> Float[Tensor, "*batch k"]:
    """The min(k1, k2) angles between two subspaces in radians, 0 to pi/2, ascending.

    Formula: cosines are sigma(Q1^T Q2), sines those of the part of the smaller outside the larger,
    Q2 - Q1 Q1^T Q2 (Björck and Golub 1973; Knyazev and Argentati 2002). Each angle is atan2 of its pair, so it is exact
    near 0 and near pi/2.

    Args:
        q1, q2: bases with orthonormal columns. NaN in one gives NaN for all of its angles.
    """
    q1, q2 = to_float64(q1), to_float64(q2)
    if q1.shape[-1] < q2.shape[-1]:
        q1, q2 = q2, q1
    shared = q1.mT @ q2  # (*batch, k1, k2)
    cosines, sines = nan_safe_svdvals(shared), nan_safe_svdvals(q2 - q1 @ shared)  # both descending, (*batch, k2)
    return torch.atan2(sines.flip(-1)[..., -cosines.shape[-1] :], cosines)


@dataclass(frozen=True)
class UpdateAngles:
    """Angles in radians, ascending, between the column spaces and between the row spaces of two updates."""

    columns: Float[Tensor, "*batch k"]
    rows: Float[Tensor, "*batch k"]


def update_angles(
    a1: Float[Tensor, "*batch rank1 inputs"],
    b1: Float[Tensor, "*batch outputs rank1"],
    a2: Float[Tensor, "*batch rank2 inputs"],
    b2: Float[Tensor, "*batch outputs rank2"],
    k: int,
) -> UpdateAngles:
    """Principal angles between the first k left (columns) and right (rows) singular vectors of two updates B A.

    NaN if one of the two has fewer than k directions. k is capped at the smaller rank. Cost: O((in + out) rank^2).
    """
    k = min(k, a1.shape[-2], a2.shape[-2])
    u1, v1 = _top_directions(a1, b1, k)
    u2, v2 = _top_directions(a2, b2, k)
    return UpdateAngles(principal_angles(u1, u2), principal_angles(v1, v2))


def _top_directions(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    u, singular, v = singular_vectors(a, b, 1.0)
    missing = (singular[..., :k] == 0)[..., None, :]  # (*batch, 1, k)
    return u[..., :k].masked_fill(missing, torch.nan), v[..., :k].masked_fill(missing, torch.nan)


def update_cosine(
    a1: Float[Tensor, "*batch rank1 inputs"],
    b1: Float[Tensor, "*batch outputs rank1"],
    s1: float,
    a2: Float[Tensor, "*batch rank2 inputs"],
    b2: Float[Tensor, "*batch outputs rank2"],
    s2: float,
) -> Float[Tensor, "*batch"]:
    """The cosine of the angle between two updates of one weight; ranks may differ; NaN if one is zero.

    Formula: <dW1, dW2> / (||dW1||_F ||dW2||_F) with <dW1, dW2> = s1 s2 <B1^T B2, A1 A2^T>, float64. Cost: six products
    of (rank, in or out), no synchronisation.
    """
    product = s1 * s2 * update_inner_product(to_float64(a1), to_float64(b1), to_float64(a2), to_float64(b2))
    return product / update_norm(a1, b1, s1) / update_norm(a2, b2, s2)
