"""Integrated gradients (arXiv 1703.01365): a change of a loss, shared out among the multipliers that made it.

The loss is a function of multipliers alpha_m, one for each part m of a change. On the straight line alpha_m = alpha for
all m, from 0 to 1, the share of m is the integral of dL/dalpha_m. Shares sum to L(1) - L(0) (completeness).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

TOLERANCE = 0.01  # of the change: the largest residual at which shares are trusted
POINTS = (8, 16, 32)  # of the quadrature, tried in turn until the residual is within the tolerance


def gauss_legendre(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the Gauss-Legendre quadrature on [0, 1], (points,) each, float64.

    It is exact for polynomials of degree 2 points - 1, so one point, the middle, is exact for a loss that is quadratic
    in alpha, whose derivative is linear.

    Example:
        >>> nodes, weights = gauss_legendre(1)
        >>> nodes.tolist(), weights.tolist()
        ([0.5], [1.0])
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return (nodes + 1) / 2, weights / 2


def integrate_gradients(gradients: Iterable[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The weighted sum of gradients at the nodes of a quadrature, in float64; each has the shape of the result."""
    total = sum(weight * np.asarray(part, np.float64) for part, weight in zip(gradients, weights, strict=True))
    return np.asarray(total)


def completeness_residual(shares: np.ndarray, change: float) -> float:
    """How far the sum of shares is from the change of the loss, relative to it: |sum - change| / |change|.

    0 where both are 0, as of an adapter that changes nothing; infinite where only the change is, or either is NaN.
    """
    apart = abs(float(np.sum(shares)) - change)
    if apart == 0:
        return 0.0
    return apart / abs(change) if np.isfinite(apart) and change else float("inf")
