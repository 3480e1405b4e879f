"""Subspaces and angles known by construction, or computed densely in float64."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from training_lens.measures import subspaces as similarity

checked = jaxtyped(typechecker=beartype)
subspace_similarity, subspace_grid = checked(similarity.subspace_similarity), checked(similarity.subspace_grid)
principal_angles, update_angles = checked(similarity.principal_angles), checked(similarity.update_angles)
update_cosine = checked(similarity.update_cosine)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_subspace_is_all_of_itself_and_nothing_of_its_complement() -> None:
    a = normal(3, 4, 12)
    torch.testing.assert_close(subspace_similarity(a, 2 * a, 2, 2), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(subspace_similarity(a, a, 2, 4), torch.ones(3, dtype=torch.float64))
    first, second = torch.eye(6)[:3], torch.eye(6)[3:]
    assert subspace_similarity(first, second, 3, 2) == 0


def test_random_subspaces_share_what_chance_gives() -> None:
    a1, a2 = normal(600, 8, 40), normal(600, 8, 40, seed=1)
    for i, j in [(1, 1), (2, 6), (8, 8)]:
        assert subspace_similarity(a1, a2, i, j).mean().item() == pytest.approx(max(i, j) / 40, rel=0.12)


def test_the_grid_is_the_similarity_at_each_place() -> None:
    a1, a2 = normal(2, 3, 10), normal(2, 5, 10, seed=1)
    grid = subspace_grid(a1, a2, 4)
    assert grid.shape == (2, 3, 4)  # a1 has three directions
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(grid[:, i, j], subspace_similarity(a1, a2, i + 1, j + 1))


def test_more_directions_than_there_are_count_as_those_there_are() -> None:
    a1, a2 = normal(6, 4), normal(3, 4, seed=1)  # rank 6 in 4 dimensions holds them all
    assert subspace_similarity(a1, a2, 9, 9).item() == pytest.approx(1.0)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.7, math.pi / 2 - 1e-9, math.pi / 2])
def test_an_angle_is_found_exactly_at_both_ends(angle: float) -> None:
    q1 = torch.eye(5, dtype=torch.float64)[:, :2]
    q2 = q1.clone()
    q2[0, 0], q2[2, 0] = math.cos(angle), math.sin(angle)  # turned in the plane of the first and third axis
    for found in (principal_angles(q1, q2), principal_angles(q2, q1)):
        torch.testing.assert_close(found, torch.tensor([0.0, angle], dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_angles_of_subspaces_of_different_size() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    q2 = (math.cos(0.3) * axes[:, 1] + math.sin(0.3) * axes[:, 5])[:, None]
    for found in (principal_angles(axes[:, :3], q2), principal_angles(q2, axes[:, :3])):
        torch.testing.assert_close(found, torch.tensor([0.3], dtype=torch.float64))
    whole = principal_angles(axes[:, :4], axes[:, 1:])  # four of six dimensions and five: three are shared at least
    torch.testing.assert_close(whole, torch.tensor([0, 0, 0, math.pi / 2], dtype=torch.float64))


def test_angles_of_random_subspaces_are_those_of_the_cosines() -> None:
    q1 = torch.linalg.qr(normal(3, 20, 5).double()).Q
    q2 = torch.linalg.qr(normal(3, 20, 7, seed=1).double()).Q
    wanted = torch.linalg.svdvals(q1.mT @ q2).acos()
    torch.testing.assert_close(principal_angles(q1, q2), wanted)


def test_angles_between_updates_are_those_of_their_dense_vectors() -> None:
    a1, b1, a2, b2 = normal(2, 3, 14), normal(2, 10, 3, seed=1), normal(2, 5, 14, seed=2), normal(2, 10, 5, seed=3)
    found = update_angles(a1, b1, a2, b2, 2)
    (u1, _, v1), (u2, _, v2) = (torch.linalg.svd(b.double() @ a.double()) for a, b in ((a1, b1), (a2, b2)))
    columns = torch.linalg.svdvals(u1[..., :2].mT @ u2[..., :2]).acos()
    rows = torch.linalg.svdvals(v1[..., :2, :] @ v2[..., :2, :].mT).acos()
    torch.testing.assert_close(found.columns, columns)
    torch.testing.assert_close(found.rows, rows)
    same = update_angles(a1, b1, 3 * a1, b1, 9)
    assert same.columns.shape == (2, 3) and same.columns.max() < 1e-6 and same.rows.max() < 1e-6


def test_an_update_without_directions_has_no_angles() -> None:
    a, b = normal(2, 3, 8), normal(2, 6, 3, seed=1)
    b[0] = 0
    found = update_angles(a, b, a, b, 1)
    assert found.columns[0].isnan().all() and found.rows[0].isnan().all() and found.columns[1].isfinite().all()


def test_the_cosine_of_updates_is_the_dense_one() -> None:
    a1, b1, a2, b2 = normal(3, 4, 14), normal(3, 10, 4, seed=1), normal(3, 6, 14, seed=2), normal(3, 10, 6, seed=3)
    dense1, dense2 = (-0.5 * b1.double() @ a1.double()).flatten(1), (2 * b2.double() @ a2.double()).flatten(1)
    wanted = torch.cosine_similarity(dense1, dense2, dim=1)
    torch.testing.assert_close(update_cosine(a1, b1, -0.5, a2, b2, 2.0), wanted)
    torch.testing.assert_close(update_cosine(a1, b1, 1.0, a1.flip(-2), b1.flip(-1), 9.0), torch.ones(3).double())
    assert update_cosine(a1, b1, 1.0, a2, torch.zeros_like(b2), 1.0).isnan().all()
    sixteen = update_cosine(a1.bfloat16(), b1.bfloat16(), -0.5, a2.bfloat16(), b2.bfloat16(), 2.0)
    torch.testing.assert_close(sixteen, wanted, rtol=0.05, atol=0.01)
