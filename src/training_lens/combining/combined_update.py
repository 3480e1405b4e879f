"""The combination of one module's low-rank updates, as factors A and B of one update with scale 1.

dW_i = s_i B_i A_i is an adapter's update of the module and w_i its weight; the sum is S = sum w_i dW_i.

- cat: S itself, B = [w_1 s_1 B_1, w_2 s_2 B_2, ...] and A = [A_1; A_2; ...]. Ranks add up.
- svd: the best approximation of S of a smaller rank (Eckart and Young 1936).
- linear: the sums of the factors, B = sum |w_i s_i|^(1/2) B_i and A = sum sign(w_i s_i) |w_i s_i|^(1/2) A_i, as in
  PEFT. It keeps the rank; its product is S and the cross terms B_i A_j, which nothing trained.
- ties: of each dW_i the share `density` of the largest numbers; of these, where their signs differ, those with the sign
  of their sum; the mean of these, each times w_i (arXiv 2306.01708); then the best approximation of that.
- dare: of each dW_i a random share `density`, divided by it; their sum with the weights (arXiv 2311.03099); then the
  best approximation of that.

ties and dare are PEFT's functions, on whole matrices (PEFT's `ties_svd`, `dare_linear_svd`): the papers define them on
updates, and on the factors they would have the cross terms as well.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training_lens.combining.combine_recipe import Recipe
from training_lens.measures.singular_values import singular_values, truncate_rank, update_norm
from training_lens.merging.weight_update import LowRankUpdate


@dataclass(frozen=True)
class WeightedUpdate:
    """One adapter's update of a module, s B A with s in `update.factor`, and its weight."""

    update: LowRankUpdate
    weight: float

    @property
    def strength(self) -> float:
        """w s."""
        return self.weight * self.update.factor

    @property
    def rank(self) -> int:
        return len(self.update.a)

    def compute_matrix(self) -> Tensor:
        """dW without its weight, (out, in), float64."""
        return self.update.factor * (self.update.b.double() @ self.update.a.double())


@dataclass(frozen=True)
class CombinedModule:
    """The written factors of a module, float32, and what they are of what the method defines.

    `energy_kept` is the share of the sum of squares of the method's matrix that the rank keeps; `from_sum` is the
    Frobenius norm of B A - S, and `sum_norm` that of S.
    """

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    energy_kept: float
    from_sum: float
    sum_norm: float

    @property
    def rank(self) -> int:
        return len(self.a)


@torch.no_grad()
def combine_updates(updates: Sequence[WeightedUpdate], recipe: Recipe, module: str) -> CombinedModule:
    """The combination of the adapters that adapt a module.

    Args:
        module: its path; with the recipe's seed it decides what dare draws.

    Cost: cat, linear and svd O((in + out) rank^2). ties and dare form the matrix of each adapter in float64, and
    decompose one of the smaller side squared.
    """
    a, b = concatenate_factors(updates)
    if recipe.how == "cat":
        small_a, small_b, kept = a, b, 1.0
    elif recipe.how == "linear":
        small_a, small_b, kept = *_add_factors(updates), 1.0
    elif recipe.how == "svd":
        small_a, small_b, kept = _cut_factors(a, b, choose_rank(updates, recipe))
    else:
        small_a, small_b, kept = _cut_matrix(_prune_and_add(updates, recipe, module), choose_rank(updates, recipe))
    small_a, small_b = small_a.float().contiguous(), small_b.float().contiguous()
    apart = update_norm(torch.cat([small_a.double(), a]), torch.cat([small_b.double(), -b], 1), 1.0)
    return CombinedModule(small_a, small_b, kept, float(apart), float(update_norm(a, b, 1.0)))


def concatenate_factors(updates: Sequence[WeightedUpdate]) -> tuple[Tensor, Tensor]:
    """A (sum of ranks, in) and B (out, sum of ranks) of S, float64."""
    a = torch.cat([one.update.a.double() for one in updates])
    return a, torch.cat([one.strength * one.update.b.double() for one in updates], 1)


def choose_rank(updates: Sequence[WeightedUpdate], recipe: Recipe) -> int:
    """The rank of a module: the recipe's, or the largest of its adapters, as far as the matrix has so many."""
    outputs, inputs = len(updates[0].update.b), updates[0].update.a.shape[1]
    wanted = recipe.rank or max(one.rank for one in updates)
    most = sum(one.rank for one in updates) if recipe.how == "svd" else min(outputs, inputs)
    return min(wanted, most, outputs, inputs)


def _add_factors(updates: Sequence[WeightedUpdate]) -> tuple[Tensor, Tensor]:
    roots = [abs(one.strength) ** 0.5 for one in updates]
    signs = [1.0 if one.strength >= 0 else -1.0 for one in updates]
    a = sum(s * r * one.update.a.double() for s, r, one in zip(signs, roots, updates, strict=True))
    b = sum(r * one.update.b.double() for r, one in zip(roots, updates, strict=True))
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return a, b


def _cut_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    small_a, small_b = truncate_rank(a, b, 1.0, rank)
    return small_a[:rank], small_b[:, :rank], _energy_share(singular_values(a, b, 1.0), rank)


def _cut_matrix(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """By the eigenvectors of the smaller Gram matrix, a fifth of the time of a singular value decomposition.

    Its squares cost digits of the smallest singular values alone: M is projected on the vectors, whatever theirs are.
    """
    if len(matrix) > matrix.shape[1]:
        b, a, kept = _cut_matrix(matrix.mT, rank)
        return a.mT, b.mT, kept
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)  # ascending
    squares, u = squares.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]  # u is (out, rank)
    root = squares[:rank].sqrt().sqrt()
    a = (u.mT @ matrix) / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
    return a, u * root, _energy_share(squares.sqrt(), rank)


def _energy_share(singular: Tensor, rank: int) -> float:
    energy = singular.square()
    return float(energy[:rank].sum() / energy.sum()) if energy.any() else 1.0


def _prune_and_add(updates: Sequence[WeightedUpdate], recipe: Recipe, module: str) -> Tensor:
    """The matrix (out, in) of ties or dare, float64."""
    from peft.utils.merge_utils import dare_linear, ties

    matrices = [one.compute_matrix() for one in updates]
    weights = torch.tensor([one.weight for one in updates], dtype=torch.float64)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="The density")  # of 1: that nothing is pruned
        if recipe.how == "ties":
            return torch.as_tensor(ties(matrices, weights, recipe.density))
        torch.manual_seed(draw_seed(recipe, module))
        return torch.as_tensor(dare_linear(matrices, weights, recipe.density))


def draw_seed(recipe: Recipe, module: str) -> int:
    """The seed of a module's draws: another for each, and the same in whichever order modules come."""
    return zlib.crc32(f"{recipe.seed} {module}".encode())
