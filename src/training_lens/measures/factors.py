"""The factors of a low-rank update dW = s B A, and measures of it that never form the (out, in) matrix.

Leading dimensions, `*batch`, are modules of one shape, measured at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FactorA = Float[Tensor, "*batch rank inputs"]
FactorB = Float[Tensor, "*batch outputs rank"]
Weight = Float[Tensor, "*batch outputs inputs"]


class Factors(NamedTuple):
    """A (*batch, rank, in) and B (*batch, out, rank) of modules of one shape, or their gradients.

    `magnitude` (*batch, out) is DoRA's; None for other adapters.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


class Grams(NamedTuple):
    """A A^T and B^T B, (*batch, rank, rank): enough for the norms of A, B and B A."""

    a: Tensor
    b: Tensor

    @classmethod
    def from_factors(cls, a: FactorA, b: FactorB) -> Grams:
        """In the factors' own precision. Cost: two products of the factors with themselves."""
        return cls(a @ a.mT, b.mT @ b)


def to_float32(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """At least float32: float64 stays as it is; no copy if nothing changes.

    A measure is then as exact as torch's float32 products: three digits with TF32 on.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_float64(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """In float64, or in float32 on Apple's GPU, which has no float64.

    For terms that may cancel: PiSSA starts from [B, -B][A; A], whose product is 0 while its factors are large.
    """
    return to_float32(x) if x.device.type == "mps" else x.double()


def frobenius(x: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """The Frobenius norm of each matrix, in its own precision."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norm


def norm_from_gram(gram: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch"]:
    """The Frobenius norm of a factor from its Gram matrix: the root of the trace."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()


def update_inner_product(
    a1: Float[Tensor, "*batch rank1 inputs"],
    b1: Float[Tensor, "*batch outputs rank1"],
    a2: Float[Tensor, "*batch rank2 inputs"],
    b2: Float[Tensor, "*batch outputs rank2"],
) -> Float[Tensor, "*batch"]:
    """The inner product <B1 A1, B2 A2>, the sum of elementwise products.

    Formula: tr((B1 A1)^T B2 A2) = <B1^T B2, A1 A2^T>. Cost: O((in + out) rank1 rank2), in the factors' own precision.
    """
    return ((b1.mT @ b2) * (a1 @ a2.mT)).sum((-2, -1))


def nan_safe_svd(
    matrix: Float[Tensor, "*batch rows columns"],
) -> tuple[Float[Tensor, "*batch rows k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch columns k"]]:
    """U, sigma (descending) and V of the reduced decomposition U diag(sigma) V^T.

    All NaN for a matrix that holds NaN or infinity, where torch would raise: a measure must not end the training. Cost:
    waits for the device on CUDA.
    """
    clean, broken = _zero_nonfinite(matrix)
    u, singular, vh = torch.linalg.svd(clean, full_matrices=False)
    nan = torch.nan
    wide = broken[..., None, None]
    return u.masked_fill(wide, nan), singular.masked_fill(broken[..., None], nan), vh.mT.masked_fill(wide, nan)


def nan_safe_svdvals(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch k"]:
    """Singular values alone, descending, NaN as in `nan_safe_svd`, at less cost."""
    clean, broken = _zero_nonfinite(matrix)
    singular: Tensor = torch.linalg.svdvals(clean)
    return singular.masked_fill(broken[..., None], torch.nan)


def _zero_nonfinite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices, with zeros for those that hold NaN or infinity, and a mask of these, (*batch,)."""
    broken = ~matrix.isfinite().all(-1).all(-1)
    return matrix.masked_fill(broken[..., None, None], 0), broken
