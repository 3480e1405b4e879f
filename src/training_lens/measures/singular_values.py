"""The size of an update dW = s B A of a weight W, its rank, and its directions relative to W's.

A is (rank, in), B (out, rank), W (out, in), as in PEFT; leading dimensions, `*batch`, are modules of one shape.
No function forms dW but `find_intruders`. NaN in a module's factors gives NaN for that module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.measures.factors import (
    FactorA,
    FactorB,
    Grams,
    Weight,
    frobenius,
    nan_safe_svd,
    nan_safe_svdvals,
    to_float32,
    to_float64,
    update_inner_product,
)
from training_lens.utils.devices import move_to_device


def singular_values(a: FactorA, b: FactorB, scaling: float) -> Float[Tensor, "*batch k"]:
    """The min(rank, in, out) singular values of dW, descending, float64.

    Formula: with B = Q1 R1 and A^T = Q2 R2, sigma(dW) = s sigma(R1 R2^T). Values below the roundoff of that product are
    set to 0, so that factors that cancel have no spectrum. Cost: O((in + out) rank^2); waits for the device on CUDA.
    """
    a, b = to_float64(a), to_float64(b)
    r1, r2 = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.mT, mode="r").R
    return _zero_roundoff(nan_safe_svdvals(r1 @ r2.mT), a, b) * abs(scaling)


def singular_vectors(
    a: FactorA, b: FactorB, scaling: float
) -> tuple[Float[Tensor, "*batch outputs k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch inputs k"]]:
    """U, sigma and V with dW = U diag(sigma) V^T, k = min(rank, in, out), float64, sigma as in `singular_values`.

    Directions with sigma 0 are only orthonormal to the others. Cost: twice that of `singular_values`.
    """
    a, b = to_float64(a), to_float64(b)
    (q1, r1), (q2, r2) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, singular, v = nan_safe_svd(r1 @ r2.mT)  # (k1, k), (k), (k2, k)
    sign = -1 if scaling < 0 else 1
    return sign * (q1 @ u), _zero_roundoff(singular, a, b) * abs(scaling), q2 @ v


def _zero_roundoff(singular: Tensor, a: Tensor, b: Tensor) -> Tensor:
    roundoff = torch.finfo(singular.dtype).eps * max(a.shape[-1], b.shape[-2])
    floor = roundoff * frobenius(a) * frobenius(b)  # (*batch)
    return singular.masked_fill(singular <= floor[..., None], 0)


def effective_rank(singular: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """Over how many directions a spectrum is spread: k for k equal singular values, 0 for zeros.

    Formula: exp(-sum p ln p) with p = sigma / sum sigma (Roy and Vetterli 2007, "The effective rank").

    Example:
        >>> effective_rank(torch.tensor([3.0, 3.0, 0.0]))
        tensor(2.)
    """
    singular = to_float32(singular)
    total = singular.sum(-1)
    rank: Tensor = torch.special.entr(singular / total[..., None]).sum(-1).exp()
    return rank.masked_fill(total == 0, 0)


def stable_rank(singular: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """How many directions as strong as the first would give the same norm; 0 for zeros.

    Formula: ||dW||_F^2 / sigma_1^2 (Rudelson and Vershynin 2007, arXiv math/0503442).
    """
    singular = to_float32(singular)
    top = singular[..., :1]
    return (singular / top).square().sum(-1).masked_fill(top[..., 0] == 0, 0)


def energy_rank(singular: Float[Tensor, "*batch k"], share: float = 0.9) -> Float[Tensor, "*batch"]:
    """The smallest k whose first k singular values hold `share` of the sum of squares; 0 for zeros.

    A whole number stored as a float, so that it is NaN if the spectrum is.

    Args:
        share: above 0, at most 1.

    Example:
        >>> energy_rank(torch.tensor([4.0, 2.0, 1.0, 1.0]))  # 20 of 22 lie in two
        tensor(2.)
    """
    energy = to_float32(singular).square().cumsum(-1)
    total = energy[..., -1]
    short = (energy < share * total[..., None]).sum(-1)  # how many directions are not enough
    return torch.where(total > 0, short + 1, total)


def update_norm(a: FactorA, b: FactorB, scaling: float) -> Float[Tensor, "*batch"]:
    """||dW||_F, the size of the update, float64.

    Formula: ||s B A||_F^2 = s^2 <B^T B, A A^T>. Relative error about 1e-8 ||A|| ||B|| / ||B A||. Cost: two products of
    (rank, in) and (rank, out) with themselves, no synchronisation: cheap enough for every step.
    """
    return update_norm_from_grams(Grams.from_factors(to_float64(a), to_float64(b)), scaling)


def update_norm_from_grams(grams: Grams, scaling: float) -> Float[Tensor, "*batch"]:
    """`update_norm` from the factors' Gram matrices, float64.

    With float32 matrices the square's relative error is about 1e-7 (||A|| ||B|| / ||B A||)^2: enough for trained
    factors, too little for PiSSA's, which cancel at the start.
    """
    return abs(scaling) * (to_float64(grams.a) * to_float64(grams.b)).sum((-2, -1)).clamp(min=0).sqrt()


def step_norm(a0: FactorA, b0: FactorB, a1: FactorA, b1: FactorB, scaling: float) -> Float[Tensor, "*batch"]:
    """||dW1 - dW0||_F, how far the update has moved from the factors a0, b0 to a1, b1.

    Formula: dW1 - dW0 = s [B1 - B0, B0] [A1; A1 - A0]. It subtracts factors and not their
    products, so that a step of a millionth keeps its digits in float32. Cost: six products of (rank, in or out), no
    synchronisation: cheap enough for every step.

    Example:
        >>> a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0], [0.0]])
        >>> step_norm(a, b, 2 * a, b, scaling=0.5)  # dW goes from 1.5 to 3 in its one place
        tensor(1.5000)
    """
    a0, b0, a1, b1 = to_float32(a0), to_float32(b0), to_float32(a1), to_float32(b1)
    da, db = a1 - a0, b1 - b0
    square = (
        update_inner_product(a1, db, a1, db)
        + 2 * update_inner_product(a1, db, da, b0)
        + update_inner_product(da, b0, da, b0)
    )
    return abs(scaling) * square.clamp(min=0).sqrt()


def balance(grams: Grams) -> Float[Tensor, "*batch"]:
    """||A A^T - B^T B||_F: 0 if A and B share the update evenly.

    Gradient flow conserves the matrix; a step of plain gradient descent with rate eta changes it only by
    eta^2 (gA gA^T - gB^T gB) (Du, Hu and Lee 2018, arXiv 1806.00900).
    """
    return frobenius(grams.a - grams.b)


def top_ratio(a: FactorA, b: FactorB) -> Float[Tensor, "*batch"]:
    """sigma_1(B) / sigma_1(A), from the (rank, rank) Gram matrices: 0 for B = 0, infinite for A = 0 alone.

    Cost: `update_norm` and a decomposition of (rank, rank); waits for the device on CUDA.
    """
    a, b = to_float32(a), to_float32(b)
    return (nan_safe_svdvals(b.mT @ b)[..., 0] / nan_safe_svdvals(a @ a.mT)[..., 0]).sqrt()


def top_singular_value(weight: Weight, iterations: int = 16) -> Float[Tensor, "*batch"]:
    """The largest singular value of a weight by the Lanczos method: a lower bound within about 1 %.

    Formula: sigma_1(W Q^T), the rows of Q an orthonormal basis of x, W^T W x, ... (W^T W)^iterations x for a random x
    (Kuczynski and Wozniakowski 1992, doi 10.1137/0613066: its error falls as (ln in / iterations)^2 at worst). x is
    always the same, and torch's random state is unchanged. Pure noise is the hardest case: 0.2 % below at 4096 x 4096.
    Cost: 2 x iterations + 1 products of W with one vector, a float32 copy of a 16-bit W; waits for the device on CUDA.
    """
    weight = to_float32(weight)
    weight = weight if weight.shape[-1] <= weight.shape[-2] else weight.mT  # the smaller side is less work
    basis = _random_direction(weight)  # (*batch, 1, in), one row more with each iteration
    images = basis @ weight.mT  # (*batch, 1, out)
    for _ in range(min(iterations, weight.shape[-1] - 1)):
        direction = _orthonormalize(basis, images[..., -1:, :] @ weight)
        basis = torch.cat([basis, direction], -2)
        images = torch.cat([images, direction @ weight.mT], -2)
    return nan_safe_svdvals(images)[..., 0]


def _random_direction(weight: Tensor) -> Tensor:
    """(*batch, 1, in), of length 1, the same at each call and on each device."""
    *batch, _, inputs = weight.shape
    drawn = torch.randn((*batch, 1, inputs), generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    direction: Tensor = move_to_device(drawn / drawn.norm(dim=-1, keepdim=True), weight.device)
    return direction


def _orthonormalize(basis: Tensor, row: Tensor) -> Tensor:
    """The part of the row (*batch, 1, in) orthogonal to the basis, scaled to length 1; 0 if it is only roundoff."""
    roundoff = 16 * torch.finfo(row.dtype).eps * torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    for _ in range(2):  # a single pass leaves a part along the basis if the orthogonal part is small
        row = row - (row @ basis.mT) @ basis
    length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    direction: Tensor = (row / length).masked_fill(length <= roundoff, 0)
    return direction


def truncate_rank(a: FactorA, b: FactorB, scaling: float, rank: int) -> tuple[FactorA, FactorB]:
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


def amplification(weight: Weight, a: FactorA, b: FactorB, scaling: float, k: int) -> Float[Tensor, "*batch"]:
    """How much the update amplifies what W already does in the update's own directions; NaN for no update.

    Formula: ||dW||_F / ||U^T W V^T||_F with U and V the first k singular directions of dW, as far as it has them
    (LoRA, arXiv 2106.09685, Table 7). Cost: `singular_vectors` and a product of W with k vectors.
    """
    u, singular, v = singular_vectors(a, b, scaling)
    weight, missing = to_float32(weight), singular[..., None, :k] == 0  # (*batch, 1, k)
    u, v = u[..., :k].to(weight.dtype), v[..., :k].masked_fill(missing, 0).to(weight.dtype)
    overlap = frobenius(u.mT @ weight @ v)
    norm: Tensor = singular.norm(dim=-1)
    return (norm / overlap).masked_fill(norm == 0, torch.nan)


@dataclass(frozen=True)
class IntruderDirections:
    """The directions among the first k of W + dW that W does not have.

    `count` is how many, a whole number stored as a float; `energy_share` their sigma^2 over the sum of sigma^2 of the
    first k; `cosines` each direction's largest absolute cosine with a direction of W, strongest direction first.
    """

    count: Float[Tensor, "*batch"]
    energy_share: Float[Tensor, "*batch"]
    cosines: Float[Tensor, "*batch k"]


def find_intruders(
    weight: Weight, a: FactorA, b: FactorB, scaling: float, k: int = 10, threshold: float = 0.5
) -> IntruderDirections:
    """Left singular vectors among the first k of W + dW whose largest cosine with those of W is below the threshold.

    From arXiv 2410.21228 (k = 10, with several thresholds). Only vectors with a singular value above roundoff count, in
    W and in W + dW. At most min(out, in) directions are taken. Cost: two full decompositions, O(out in min(out, in)),
    and two dense copies of W: for the analysis of a checkpoint, not for every step.
    """
    weight = to_float32(weight)
    after = weight + scaling * (to_float32(b) @ to_float32(a)).to(weight.dtype)
    old, old_values, _ = nan_safe_svd(weight)
    new, new_values, _ = nan_safe_svd(after)
    known = old * _significance_mask(old_values, weight)[..., None, :]
    cosines = (new[..., :k].mT @ known).abs().amax(-1)  # (*batch, k)
    energy = (new_values * _significance_mask(new_values, weight))[..., :k].square()  # (*batch, k)
    intruding = torch.where(cosines.isnan(), cosines, ((cosines < threshold) & (energy > 0)).to(cosines.dtype))
    return IntruderDirections(intruding.sum(-1), (intruding * energy).sum(-1) / energy.sum(-1), cosines)


def _significance_mask(singular: Tensor, matrix: Tensor) -> Tensor:
    """1 for singular values above roundoff, else 0, (*batch, k)."""
    floor = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:]) * singular[..., :1]
    return (singular > floor).to(matrix.dtype)


def dora_change(
    weight: Weight, a: FactorA, b: FactorB, scaling: float, magnitude: Float[Tensor, "*batch outputs"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """How far the rows w of W have moved on average, in length and in direction (DoRA, arXiv 2402.09353, section 3.2).

    Formula: mean |m - ||w||| and mean (1 - cos(w', w)), with m the magnitude that PEFT trains for each row (DoRA's
    columns) and w' = w + d, d = s b A; with ||w'||^2 = ||w||^2 + 2 s b A w + s^2 b A A^T b^T, so dW is not formed.
    Float64 from there on: a rotation by an angle of 1e-5 keeps five digits. A row of zeros, before or after, has no
    direction and counts as not rotated. Cost: a product of W with rank vectors, a float32 copy of a 16-bit W.
    """
    weight = to_float32(weight)
    length_sq = to_float64(weight.norm(dim=-1)).square()  # (*batch, out)
    along = to_float64(weight @ a.to(weight.dtype).mT)  # (*batch, out, rank): A w of each row
    a, b = to_float64(a), scaling * to_float64(b)
    cross = (b * along).sum(-1)  # w . d
    moved_sq = (b * (b @ (a @ a.mT))).sum(-1)  # ||d||^2
    after_sq = (length_sq + 2 * cross + moved_sq).clamp(min=0)
    product = length_sq * after_sq
    rotated = (1 - (length_sq + cross) / product.sqrt()).masked_fill(product == 0, 0)
    stretched = (to_float64(magnitude) - length_sq.sqrt()).abs()
    return stretched.mean(-1), rotated.mean(-1)
