"""Measures of gradients: a check of their capture, their direction, their noise, and Adam's update.

None of these waits for the device or draws random numbers, so they may run at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.measures.factors import frobenius, to_float32


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

    Args:
        grad_norms: ||gA|| and ||gB||, if known already.

    Cost: two products of (rank, in or out) with each other and four norms.
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


@dataclass(frozen=True)
class NoiseScale:
    """`signal` estimates ||E g||^2, `noise` the trace of the covariance of one example's gradient.

    Both are unbiased and may be negative; average each over many steps before dividing. `scale` = noise / signal is the
    batch size, in examples, above which more examples add little; NaN if the signal is not above 0.
    """

    signal: Float[Tensor, "*batch"]
    noise: Float[Tensor, "*batch"]
    scale: Float[Tensor, "*batch"]


def noise_scale(
    small_sq: Float[Tensor, "*batch"], big_sq: Float[Tensor, "*batch"], small: float, big: float
) -> NoiseScale:
    """The simple noise scale of the gradient, from its squared norm at two batch sizes.

    Formula: with b = small, B = big, signal = (B gB2 - b gb2) / (B - b) and noise = (gb2 - gB2) / (1/b - 1/B)
    (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

    Args:
        small_sq: squared norm of a micro-batch's mean gradient, averaged over the micro-batches.
        big_sq: squared norm of the step's mean gradient.
        small: examples, or supervised tokens, in a micro-batch: the unit of `noise` and `scale`.
        big: those in the step. If it is not above `small`, all three are NaN: one micro-batch is not enough.
    """
    small_sq, big_sq = to_float32(small_sq), to_float32(big_sq)
    if big <= small:
        unknown = torch.full_like(big_sq, torch.nan)
        return NoiseScale(unknown, unknown, unknown)
    signal = (big * big_sq - small * small_sq) / (big - small)
    noise = (small_sq - big_sq) / (1 / small - 1 / big)
    return NoiseScale(signal, noise, (noise / signal).masked_fill(signal <= 0, torch.nan))


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


@dataclass(frozen=True)
class Importance:
    """AdaLoRA's running measure of each weight (arXiv 2303.10512, section 3.2): shapes are those of the weight."""

    sensitivity: Float[Tensor, "*shape"]
    uncertainty: Float[Tensor, "*shape"]

    @property
    def importance(self) -> Tensor:
        """The score of each weight: sensitivity times uncertainty."""
        return self.sensitivity * self.uncertainty


def importance_step(
    state: Importance | None,
    weight: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Importance:
    """The measure after one more step; `state` None starts at zeros.

    Formula: I = |w g|, sensitivity = beta1 sensitivity + (1 - beta1) I, uncertainty = beta2 uncertainty +
    (1 - beta2) |I - sensitivity| (equations 9 to 11); both betas are 0.85 as in the paper's experiments.
    """
    now = (to_float32(weight) * to_float32(gradient)).abs()
    before = state or Importance(torch.zeros_like(now), torch.zeros_like(now))
    sensitivity = before.sensitivity.lerp(now, 1 - beta1)
    return Importance(sensitivity, before.uncertainty.lerp((now - sensitivity).abs(), 1 - beta2))
