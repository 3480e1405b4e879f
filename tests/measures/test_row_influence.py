"""Adam's next direction is what torch's Adam does; rank correlation is Spearman's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training_lens.measures.row_influence import adam_direction, cosine_with, rank_correlation


@pytest.mark.parametrize("updates", [0, 1, 7])
def test_the_direction_is_torchs_next_adam_update(updates: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    first = second = torch.zeros_like(weight)
    for _ in range(updates):
        weight.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        optimizer.step()
        first, second = (optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq"))
    weight.grad = torch.randn(50, generator=generator, dtype=torch.float64)
    before = weight.detach().clone()
    wanted = adam_direction(weight.grad, first, second, updates)
    optimizer.step()
    torch.testing.assert_close((before - weight.detach()) / 1e-3, wanted, rtol=1e-9, atol=1e-10)


def test_the_cosine_is_0_where_a_vector_is() -> None:
    queries = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert cosine_with(queries, torch.tensor([6.0, 8.0], dtype=torch.float64)).tolist() == [pytest.approx(1.0), 0.0]
    assert cosine_with(queries, torch.zeros(2, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_rank_correlation_is_spearmans() -> None:
    x = np.array([3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.6, 5.3])
    assert rank_correlation(x, np.exp(x)).rho == 1 and rank_correlation(x, -(x**3)).rho == -1
    ranks = np.argsort(np.argsort(x)).astype(float)
    other = ranks[[1, 0, 3, 2, 4, 5, 6, 7]]
    squares = ((other - ranks) ** 2).sum()  # without ties: 1 - 6 sum d^2 / (n (n^2 - 1))
    assert rank_correlation(x, other).rho == pytest.approx(1 - 6 * squares / (8 * 63))
    tied = rank_correlation(np.array([1.0, 1, 2, 3, 3]), np.array([1.0, 1, 2, 3, 3]))
    assert tied.rho == 1 and tied.count == 5
    assert math.isnan(rank_correlation(x, np.zeros(8)).rho) and not rank_correlation(x, np.zeros(8)).is_positive


def test_its_interval_covers_what_it_should() -> None:
    """Of pairs that are independent, about 95 % of intervals hold 0."""
    generator = np.random.default_rng(0)
    found = [rank_correlation(*generator.normal(size=(2, 32))) for _ in range(400)]
    assert 0.92 < np.mean([one.low <= 0 <= one.high for one in found]) < 0.98
