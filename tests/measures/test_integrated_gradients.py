"""Integrated gradients in closed form: complete for a quadratic loss at one point, and at many for any smooth one."""

from __future__ import annotations

import numpy as np
import pytest

from training_lens.measures.integrated_gradients import completeness_residual, gauss_legendre, integrate_gradients

GENERATOR = np.random.default_rng(0)
HESSIAN = (lambda half: half @ half.T)(GENERATOR.normal(size=(5, 5)))
CENTER, STEP = GENERATOR.normal(size=(2, 5))


def gradient_of_quadratic(alpha: float) -> np.ndarray:
    """dL/dalpha_m of L = (x - c)^T H (x - c) / 2 at x = alpha v, by the multiplier of v_m."""
    result: np.ndarray = STEP * (HESSIAN @ (alpha * STEP - CENTER))
    return result


def quadratic(alpha: float) -> float:
    away = alpha * STEP - CENTER
    return float(away @ HESSIAN @ away) / 2


def test_one_point_is_exact_for_a_quadratic_loss() -> None:
    nodes, weights = gauss_legendre(1)
    assert nodes.tolist() == [0.5]
    shares = integrate_gradients(map(gradient_of_quadratic, nodes), weights)
    assert completeness_residual(shares, quadratic(1) - quadratic(0)) < 1e-12
    many = integrate_gradients(map(gradient_of_quadratic, gauss_legendre(16)[0]), gauss_legendre(16)[1])
    assert np.allclose(shares, many, rtol=1e-12)  # and each share is


def test_more_points_are_exact_for_higher_powers() -> None:
    """n points integrate alpha^k exactly up to k = 2 n - 1."""
    for points in (2, 8, 16):
        nodes, weights = gauss_legendre(points)
        for power in (0, 1, 2 * points - 1):
            assert weights @ nodes**power == pytest.approx(1 / (power + 1), rel=1e-12)
    nodes, weights = gauss_legendre(2)
    assert weights @ nodes**4 != pytest.approx(1 / 5, rel=1e-3)


def test_the_residual_tells_what_is_missing() -> None:
    assert completeness_residual(np.array([-1.0, -0.98]), -2.0) == pytest.approx(0.01)
    assert completeness_residual(np.zeros(3), 0.0) == 0
    assert completeness_residual(np.ones(3), 0.0) == float("inf")
    assert completeness_residual(np.array([np.nan]), 1.0) == float("inf")
