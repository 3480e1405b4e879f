"""Interpolation is exact, barriers of known losses are known, and truncation is optimal."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.linalg import matrix_norm

from training_lens.measures import barrier as barriers

checked = jaxtyped(typechecker=beartype)
interpolate, barrier, truncate = (
    checked(barriers.interpolate_updates),
    checked(barriers.loss_barrier),
    checked(barriers.truncate_rank),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_mix_of_factors_is_the_mix_of_the_changes(alpha: float) -> None:
    first, second = (normal(2, 3, 9), normal(2, 7, 3, seed=1)), (normal(2, 5, 9, seed=2), normal(2, 7, 5, seed=3))
    a, b = interpolate(first, second, alpha)
    wanted = alpha * first[1] @ first[0] + (1 - alpha) * second[1] @ second[0]
    torch.testing.assert_close(b @ a, wanted)
    assert a.shape == (2, 8, 9) and b.shape == (2, 7, 8)


def test_a_mix_of_sixteen_bit_factors_is_not_rounded() -> None:
    factors = normal(2, 4).bfloat16(), normal(3, 2, seed=1).bfloat16()
    a, b = interpolate(factors, factors, 0.3)
    torch.testing.assert_close(b @ a, factors[1].float() @ factors[0].float(), rtol=1e-6, atol=1e-6)


def test_a_convex_loss_has_no_barrier() -> None:
    alphas = torch.linspace(0, 1, 11)
    convex = torch.stack([(alphas - 0.4).square(), alphas, torch.ones(11)])
    assert (barrier(alphas, convex).abs() < 1e-7).all()


def test_a_hill_is_as_high_as_it_stands_above_the_line() -> None:
    alphas = torch.linspace(0, 1, 11)
    losses = 2 + 3 * alphas + 4 * alphas * (1 - alphas)
    torch.testing.assert_close(barrier(alphas, losses), torch.tensor(1.0))
    mixed = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(barrier(alphas[mixed], losses[mixed]), torch.tensor(1.0))  # in any order
    losses[5] = torch.nan
    assert barrier(alphas, losses).isnan()


@pytest.mark.parametrize("scaling", [2.0, -0.5])
@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(12, 9, 5), (3, 9, 5)])
def test_truncation_leaves_out_the_smallest_directions_and_no_more(
    scaling: float, inputs: int, outputs: int, rank: int
) -> None:
    a, b = normal(2, rank, inputs), normal(2, outputs, rank, seed=1)
    whole = scaling * b.double() @ a.double()
    singular = torch.linalg.svdvals(whole)
    for kept in (1, 2, rank):
        less_a, less_b = truncate(a, b, scaling, kept)
        assert less_a.shape == a.shape and less_b.shape == b.shape
        left_out = singular[..., kept:].square().sum(-1).sqrt()
        torch.testing.assert_close(matrix_norm(whole - scaling * less_b @ less_a), left_out, rtol=1e-9, atol=1e-12)
        assert not less_a[:, kept:].any() and not less_b[..., kept:].any()
