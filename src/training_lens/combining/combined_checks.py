"""Whether a written combination is what its method defines: computed anew in float64 from the files of all adapters.

Nothing of `combined_update` but the seed of a module's draws is used here, so that a bug there is not repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training_lens.combining.combine_recipe import Recipe
from training_lens.combining.combined_update import WeightedUpdate, draw_seed
from training_lens.merging.verification import MergeCheck
from training_lens.merging.weight_update import ROUNDOFF, LowRankUpdate, Update

POWER_VECTORS, POWER_STEPS = 8, 4  # of the power iteration
SLACK = 1 + 1e-6  # of the bound, for the comparison's own rounding in float64
DISTANCE = 1e-6  # of the matrix: how far the written update may be from its best approximation, by rounding


@torch.no_grad()
def check_combination(
    updates: Mapping[str, Sequence[WeightedUpdate]], recipe: Recipe, written: Mapping[str, Update]
) -> tuple[MergeCheck, MergeCheck]:
    """Compare every written update with the method's, by the names of the base's weights.

    The first check is, for cat and linear, the largest difference of a number in roundings, where one rounding is
    2^-23 |B| |A|: both factors are rounded to float32. For the others it is the distance of the written update to the
    best approximation of its rank of the method's matrix M, relative to |M|. The second counts updates that only one
    side has. Memory: one module's matrices in float64. Cost: products with them.
    """
    lost = sorted(updates.keys() ^ written.keys())
    is_exact = recipe.how in ("cat", "linear")
    measure = _largest_error if is_exact else _distance_to_best
    errors = {
        name: measure(_compute_matrix(updates[name], recipe, name.removesuffix(".weight")), written[name])
        for name in updates.keys() & written.keys()
    }
    worst = max(errors, key=errors.__getitem__, default="")
    name, allowed = (
        ("written updates: largest error, in roundings", 1.0)
        if is_exact
        else ("written updates: distance to the best of their rank, of |M|", DISTANCE)
    )
    return (
        MergeCheck(name, errors.get(worst, math.inf), allowed, worst),
        MergeCheck("updates that are missing or of no run", float(len(lost)), 0.0, ", ".join(lost[:3])),
    )


def _largest_error(matrix: Tensor, written: Update) -> float:
    if not _is_plain(matrix, written):
        return math.inf
    assert isinstance(written, LowRankUpdate)
    b, a = written.factor * written.b.double(), written.a.double()
    allowed = 2 * SLACK * ROUNDOFF * (b.abs() @ a.abs()) + torch.finfo(torch.float32).smallest_normal
    return ((b @ a - matrix).abs() / allowed).nan_to_num(nan=math.inf).max().item()


def _distance_to_best(matrix: Tensor, written: Update) -> float:
    """The largest of three numbers that are all 0 for a best approximation alone, relative to |M|.

    They are how far B A is from M projected on the columns of B, and on the rows of A; and by how much the largest
    singular value of what is left, M - B A, exceeds the smallest one of B A. The former is found by power iteration.
    """
    if not _is_plain(matrix, written):
        return math.inf
    assert isinstance(written, LowRankUpdate)
    a, b = written.a.double(), written.factor * written.b.double()
    (left, small_b), (right, small_a), found = torch.linalg.qr(b), torch.linalg.qr(a.mT), b @ a
    aside = (found - left @ (left.mT @ matrix)).norm(), (found - (matrix @ right) @ right.mT).norm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rest = torch.svd_lowrank(matrix - found, q=min(POWER_VECTORS, *matrix.shape), niter=POWER_STEPS)[1][0]
    excess = rest - torch.linalg.svdvals(small_b @ small_a.mT)[-1]
    largest = float(torch.stack([*aside, excess]).max() / matrix.norm().clamp(min=1e-30))
    return largest if math.isfinite(largest) else math.inf


def _is_plain(matrix: Tensor, written: Update) -> bool:
    return (
        isinstance(written, LowRankUpdate)
        and written.magnitude is None
        and (len(written.b), written.a.shape[1]) == tuple(matrix.shape)
    )


def _compute_matrix(updates: Sequence[WeightedUpdate], recipe: Recipe, module: str) -> Tensor:
    """The matrix (out, in) that the method defines, before its rank is cut, float64."""
    if recipe.how == "linear":
        return _multiply_sums(updates)
    density = recipe.density or 1.0
    if recipe.how == "ties":
        kept = [_keep_largest(one.compute_matrix(), density) for one in updates]
        return _elect_and_average(kept, [one.weight for one in updates])
    generator = torch.Generator().manual_seed(draw_seed(recipe, module))
    total = torch.zeros(len(updates[0].update.b), updates[0].update.a.shape[1], dtype=torch.float64)
    for one in updates:
        matrix = one.compute_matrix()
        total += one.weight * (_keep_random(matrix, density, generator) if recipe.how == "dare" else matrix)
    return total


def _multiply_sums(updates: Sequence[WeightedUpdate]) -> Tensor:
    """Every pair B_i A_j with the roots of both strengths, and the sign of the second."""
    total = torch.zeros(len(updates[0].update.b), updates[0].update.a.shape[1], dtype=torch.float64)
    for one in updates:
        for other in updates:
            strength = math.copysign(math.sqrt(abs(one.strength * other.strength)), other.strength)
            total += strength * (one.update.b.double() @ other.update.a.double())
    return total


def _keep_largest(matrix: Tensor, density: float) -> Tensor:
    count = int(density * matrix.numel())
    if not count:
        return torch.zeros_like(matrix)
    limit = matrix.abs().flatten().kthvalue(matrix.numel() - count + 1).values
    return torch.where(matrix.abs() >= limit, matrix, 0.0)


def _keep_random(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    if density == 1:
        return matrix
    kept = torch.bernoulli(torch.full_like(matrix, density), generator=generator).bool()
    return torch.where(kept, matrix / density, 0.0)


def _elect_and_average(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of the weighted numbers whose sign is that of their unweighted sum; a sum of 0 counts as positive."""
    is_positive = torch.stack(list(matrices)).sum(0) >= 0
    agreeing = [torch.where(is_positive, m > 0, m < 0) for m in matrices]
    total = sum(w * m * agrees for w, m, agrees in zip(weights, matrices, agreeing, strict=True))
    counts = torch.stack(agreeing).sum(0).clamp(min=1)
    assert isinstance(total, Tensor)
    return total / counts
