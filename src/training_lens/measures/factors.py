"""The factors of a low-rank change dW = s B A, and what they tell of it without its (out x in) numbers being formed.

Leading dimensions, `*batch`, are modules of one shape: all of them are measured at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Factors(NamedTuple):
    """A (*batch, rank, in) and B (*batch, out, rank) of modules of one shape, or their gradients.

    `magnitude` (*batch, out) is DoRA's; None for other adapters.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


class Grams(NamedTuple):
    """A A^T and B^T B, (*batch, rank, rank): all that the norms of A, B and B A need."""

    a: Tensor
    b: Tensor

    @classmethod
    def from_factors(cls, a: Float[Tensor, "*batch rank inputs"], b: Float[Tensor, "*batch outputs rank"]) -> Grams:
        """In the factors' own precision. Cost: two products of the factors with themselves."""
        return cls(a @ a.mT, b.mT @ b)


def to_float32(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The same in float32, or float64 where it is that already; no copy where nothing changes.

    A measure is then as exact as torch's float32 products are: three digits where TF32 was switched on.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_float64(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The same in float64, or in float32 on Apple's GPU, which has no float64.

    For what may cancel: PiSSA starts from [B, -B][A; A], whose product is 0 while its factors are large.
    """
    return to_float32(x) if x.device.type == "mps" else x.double()


def frobenius(x: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """The Frobenius norm of each matrix: the root of the sum of its squares, in its own precision."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norm


def norm_from_gram(gram: Float[Tensor, "*batch rank rank"]) -> Float[Tensor, "*batch"]:
    """The Frobenius norm of the factor whose Gram matrix this is: the root of its trace."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()


def update_inner_product(
    a1: Float[Tensor, "*batch rank1 inputs"],
    b1: Float[Tensor, "*batch outputs rank1"],
    a2: Float[Tensor, "*batch rank2 inputs"],
    b2: Float[Tensor, "*batch outputs rank2"],
) -> Float[Tensor, "*batch"]:
    """The inner product <B1 A1, B2 A2>, the sum of their products element by element.

    Formula: tr((B1 A1)^T B2 A2) = <B1^T B2, A1 A2^T>. Cost: O((in + out) rank1 rank2), in the factors' own precision.
    """
    return ((b1.mT @ b2) * (a1 @ a2.mT)).sum((-2, -1))


def nan_safe_svd(
    matrix: Float[Tensor, "*batch rows columns"],
) -> tuple[Float[Tensor, "*batch rows k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch columns k"]]:
    """U, sigma (descending) and V of the reduced decomposition U diag(sigma) V^T.

    All NaN for a matrix that holds NaN or infinity, where torch stops: a measure must not end the training that it
    watches. Cost: waits for the device on CUDA.
    """
    filled, broken = _zero_nonfinite(matrix)
    u, singular, vh = torch.linalg.svd(filled, full_matrices=False)
    nan = torch.nan
    wide = broken[..., None, None]
    return u.masked_fill(wide, nan), singular.masked_fill(broken[..., None], nan), vh.mT.masked_fill(wide, nan)


def nan_safe_svdvals(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch k"]:
    """Singular values alone, descending, NaN as in `nan_safe_svd`; the same cost in kind, less of it."""
    filled, broken = _zero_nonfinite(matrix)
    singular: Tensor = torch.linalg.svdvals(filled)
    return singular.masked_fill(broken[..., None], torch.nan)


def _zero_nonfinite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices with zeros for those that hold NaN or infinity, and which these are, (*batch,)."""
    broken = ~matrix.isfinite().all(-1).all(-1)
    return matrix.masked_fill(broken[..., None, None], 0), broken
