"""Rank correlations over a grid of groups (learning rates) with some runs in each, and how sure they are."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

DRAWS = 2000


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties sharing theirs; NaN where one does not vary.

    Example:
        >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
        1.0
    """
    return _pearson(rankdata(x), rankdata(y))


def with_interval(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Spearman's correlation, and 95 % of what it is when runs are drawn with replacement within each group."""
    generator = np.random.default_rng(0)
    draws = [spearman(x[chosen], y[chosen]) for chosen in (_redrawn(groups, generator) for _ in range(DRAWS))]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return {"rho": spearman(x, y), "low": float(low), "high": float(high)}


def within_groups(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """The correlation of ranks among the runs of one group, so that nothing counts that differs between groups.

    `p` is the share of permutations within groups whose correlation is at least as far from 0. Both are NaN where x or
    y does not vary within any group.
    """
    generator = np.random.default_rng(0)
    ranks_x, ranks_y = _centred_ranks(x, groups), _centred_ranks(y, groups)
    rho = _pearson(ranks_x, ranks_y)
    if np.isnan(rho):
        return {"rho": rho, "p": float("nan")}
    others = [_pearson(ranks_x[_permuted(groups, generator)], ranks_y) for _ in range(DRAWS)]
    extreme = sum(abs(other) >= abs(rho) - 1e-12 for other in others)
    return {"rho": rho, "p": (extreme + 1) / (DRAWS + 1)}


def _centred_ranks(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    ranks = np.zeros(len(values))
    for group in np.unique(groups):
        inside = groups == group
        of_group = rankdata(values[inside])
        ranks[inside] = of_group - of_group.mean()
    return ranks


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread else float("nan")


def _redrawn(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Positions, as many of each group as it has, with replacement."""
    inside = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    return np.concatenate([generator.choice(positions, len(positions)) for positions in inside])


def _permuted(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """All positions, shuffled within each group."""
    order = np.arange(len(groups))
    for group in np.unique(groups):
        inside = np.flatnonzero(groups == group)
        order[inside] = generator.permutation(inside)
    return order
