"""How far hidden states have moved from the base's on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training_lens.measures.directions import cosine
from training_lens.measures.factors import frobenius, to_float32, to_float64


def rms(h: Float[Tensor, "*batch tokens width"]) -> Float[Tensor, "*batch"]:
    """The root mean square of hidden states over their last two dimensions. Formula: sqrt(mean(h^2)), in float32."""
    return frobenius(to_float32(h)) / math.sqrt(h.shape[-2] * h.shape[-1])


def drift(h: Float[Tensor, "*batch tokens width"], h0: Float[Tensor, "*batch tokens width"]) -> Float[Tensor, "*batch"]:
    """How far hidden states h have moved from the base's h0, relative to h0; 0 for B = 0.

    Formula: ||h - h0||_F / ||h0||_F over the last two dimensions, in float32. Remove padding first.
    """
    h, h0 = to_float32(h), to_float32(h0)
    return frobenius(h - h0) / frobenius(h0)


@dataclass(frozen=True)
class CkaEstimate:
    """Similarity of two representations, and the number of samples: report both, as few samples say little."""

    value: Float[Tensor, "*batch"]
    samples: int


def linear_cka(x: Float[Tensor, "*batch n width1"], y: Float[Tensor, "*batch n width2"]) -> CkaEstimate:
    """Debiased linear CKA of n samples in two representations: 1 if they differ only by rotation and scale.

    For unrelated representations it is 0 on average at any width, and may be negative.

    Formula: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = x x^T, L = y y^T (Kornblith et al. 2019, arXiv
    1905.00414) and the unbiased HSIC of Song et al. 2012, which is the inner product of U-centred matrices over
    n (n - 3) (Székely and Rizzo 2014, arXiv 1310.2926); so CKA is their cosine. NaN for n < 4, and if all samples of
    one are equal. Cost: O(n^2 width), memory n^2, float64.
    """
    samples = x.shape[-2]
    if samples < 4:
        return CkaEstimate(to_float64(x).new_full(x.shape[:-2], torch.nan), samples)
    return CkaEstimate(cosine(_u_centred(x), _u_centred(y), (-2, -1)), samples)


def _u_centred(x: Tensor) -> Tensor:
    """The samples' Gram matrix (*batch, n, n) without its diagonal, each row and column shifted to sum to 0."""
    n = x.shape[-2]
    centred = to_float64(x) - to_float64(x).mean(-2, keepdim=True)  # changes only the roundoff
    gram = centred @ centred.mT
    off = 1 - torch.eye(n, dtype=gram.dtype, device=gram.device)
    gram = gram * off
    rows, columns = gram.sum(-1, keepdim=True) / (n - 2), gram.sum(-2, keepdim=True) / (n - 2)
    return (gram - rows - columns + gram.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))) * off


def ratio_error(values: Float[Tensor, " tokens"], rows: Int[Tensor, " tokens"], count: int) -> Float[Tensor, ""]:
    """The standard error of the mean of `values` over tokens, whose examples `rows` are the independent draws.

    Formula: sqrt(n / (n - 1) sum_i (s_i - m t_i)^2) / sum_i t_i over n examples with the sums s_i and the numbers of
    tokens t_i, m the mean over all tokens (the ratio estimator, Cochran 1977, section 2.11). NaN for one example.

    Args:
        rows: the example of each token, from 0 to `count` - 1.
    """
    away = torch.zeros(count, device=values.device).index_add_(0, rows, values.float() - values.float().mean())
    scale = count / (count - 1) if count > 1 else math.nan
    return (scale * away.square().sum()).sqrt() / len(values)


def random_projection(width: int, dims: int, seed: int) -> Float[Tensor, "width dims"]:
    """A fixed random map of hidden states to a few numbers, h @ projection, that keeps squared lengths on average.

    Gaussian / sqrt(dims) (Johnson and Lindenstrauss 1984): relative error of a squared length about sqrt(2 / dims).
    One seed gives the same map on every machine: it is drawn on the CPU in float32. torch's random state is unchanged.
    """
    return torch.randn(width, dims, generator=torch.Generator().manual_seed(seed)) / math.sqrt(dims)
