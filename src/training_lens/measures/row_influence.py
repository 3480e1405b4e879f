"""How a training row would move an adapter, how that bears on a query, and how far predictions of it can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from training_lens.measures.curves import NORMAL_95

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of the run's AdamW, see `training.loop.optimizer.build_optimizer`


def adam_direction(
    gradient: Float[Tensor, " numbers"],
    first: Float[Tensor, " numbers"],
    second: Float[Tensor, " numbers"],
    updates: int,
    betas: tuple[float, float] = BETAS,
    epsilon: float = EPSILON,
) -> Float[Tensor, " numbers"]:
    """The direction of Adam's next update if this gradient came next: the weights would move by -rate times it.

    Formula: Gamma = m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps), with m' = b1 m + (1 - b1) g,
    v' = b2 v + (1 - b2) g^2 and t = updates + 1 (arXiv 1412.6980; as the influence of a row, arXiv 2402.04333).

    Args:
        first, second: Adam's moments after `updates` updates, before bias correction.
    """
    m = first.lerp(gradient, 1 - betas[0])
    v = second.lerp(gradient.square(), 1 - betas[1])
    t = updates + 1
    return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + epsilon)


def cosine_with(queries: Float[Tensor, "queries numbers"], direction: Float[Tensor, " numbers"]) -> Tensor:
    """The cosine of each query's vector with a direction, (queries,); 0 where either is zero."""
    scale = queries.norm(dim=1) * direction.norm()
    return torch.where(scale > 0, (queries @ direction) / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation over `count` pairs, with its 95 % interval (NaN of fewer than 4, or of constants)."""

    rho: float
    low: float
    high: float
    count: int

    @property
    def is_positive(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low > 0


def rank_correlation(predicted: np.ndarray, measured: np.ndarray) -> RankCorrelation:
    """Spearman's correlation of two series; ties share their mean rank.

    The interval is Fisher's with the variance (1 + rho^2 / 2) / (n - 3) (Bonett and Wright, Psychometrika 65, 2000).

    Example:
        >>> round(rank_correlation(np.arange(8.0), np.array([0, 1, 3, 2, 4, 5, 7, 6.0])).rho, 3)
        0.952
    """
    count = len(predicted)
    x, y = _rank_values(predicted), _rank_values(measured)
    spread = float(x.std() * y.std())
    if not spread or count < 4:
        return RankCorrelation(math.nan, math.nan, math.nan, count)
    rho = float(np.clip(((x - x.mean()) * (y - y.mean())).mean() / spread, -1.0, 1.0))
    if abs(rho) == 1.0:
        return RankCorrelation(rho, rho, rho, count)
    half = NORMAL_95 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return RankCorrelation(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), count)


def _rank_values(values: np.ndarray) -> np.ndarray:
    """The rank of each value from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]
