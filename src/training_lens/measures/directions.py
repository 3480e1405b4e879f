"""Directions: of gradients, with a check of their capture and Adam's update; and between updates and subspaces.

Only `principal_angles` waits for the device, so the others may run at every step.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.measures.factors import frobenius, nan_safe_svdvals, to_float32, to_float64, update_inner_product
from training_lens.measures.singular_values import update_norm


def self_check(
    a: Float[Tensor, "*batch rank inputs"],
    b: Float[Tensor, "*batch outputs rank"],
    grad_a: Float[Tensor, "*batch rank inputs"],
    grad_b: Float[Tensor, "*batch outputs rank"],
    grad_norms: tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]] | None = None,
) -> Float[Tensor, "*batch"]:
    """How far captured gradients violate the identity that they must satisfy: about 1e-6 in float32, 1 if broken.

    Formula: ||B^T gB - gA A^T||_F / (||B||_F ||gB||_F + ||gA||_F ||A||_F); 0 if both products are 0, NaN stays NaN.

    Derivation: with G = dL/d(BA), gB = G A^T and gA = B^T G, so B^T gB = B^T G A^T = gA A^T, exactly, at every step,
    for any loss that depends on A and B through B A alone (LoRA, rsLoRA, DoRA), and with dropout on the input, which
    only changes the G that both share. It proves that a capture is complete: both gradients come from the same step and
    micro-batches, clipped alike or not at all, and from these weights. A fresh adapter (B = 0) has gA = 0 and
    satisfies it.

    `grad_norms` are ||gA|| and ||gB||, if known already. Cost: two products of (rank, in or out), and four norms.
    """
    a, b, grad_a, grad_b = to_float32(a), to_float32(b), to_float32(grad_a), to_float32(grad_b)
    norm_a, norm_b = grad_norms or (frobenius(grad_a), frobenius(grad_b))
    gap = frobenius(b.mT @ grad_b - grad_a @ a.mT)
    scale = frobenius(b) * norm_b + norm_a * frobenius(a)
    return (gap / scale).masked_fill(scale == 0, 0)


def cosine(
    x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"], dims: int | tuple[int, ...]
) -> Float[Tensor, "*batch"]:
    """The cosine of the angle between x and y, each one vector over `dims`: 1 for the same direction, -1 for opposite.

    NaN if one of the two is zero.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [6.0, 8.0]]), dims=-1)
        tensor([0., 1.])
    """
    x, y = to_float32(x), to_float32(y)
    cosines: Tensor = (x * y).sum(dims) / x.norm(dim=dims) / y.norm(dim=dims)
    return cosines


def adam_update_rms(
    gradient: Float[Tensor, "*batch rows columns"],
    second_moment: Float[Tensor, "*batch rows columns"],
    eps: float = 1e-8,
) -> Float[Tensor, "*batch"]:
    """How far a gradient exceeds Adam's second moment: 1 for a constant gradient, more at a spike.

    Formula: sqrt(mean(g^2 / max(v, eps^2))) over each tensor (Wortsman et al. 2023, arXiv 2304.13013, section 3.4).

    Args:
        second_moment: v with its bias corrected, that is Adam's `exp_avg_sq` / (1 - beta2^t).
        eps: Adam's.
    """
    steps = to_float32(second_moment).clamp(min=eps**2).rsqrt_().mul_(gradient)  # g / sqrt(v), in one tensor
    return frobenius(steps) / math.sqrt(steps.shape[-2] * steps.shape[-1])


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
