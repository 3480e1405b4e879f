"""Gradients of a real backward pass satisfy the identity; every measure has a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped
from torch import Tensor

from training_lens.measures import directions

checked = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))  # an int is a float, too
self_check, cosine = checked(directions.self_check), checked(directions.cosine)
adam_update_rms, update_cosine = checked(directions.adam_update_rms), checked(directions.update_cosine)
principal_angles = checked(directions.principal_angles)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_gradients(variant: str, micro_batches: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B and their gradients summed over micro-batches, of a layer with a loss that is no square."""
    weight, x = normal(10, 14, seed=3), normal(micro_batches, 6, 14, seed=4)
    a, b = normal(4, 14, seed=1).requires_grad_(), normal(10, 4, seed=2).requires_grad_()
    magnitude = weight.norm(dim=1) * 1.1
    for rows in x:
        kept = torch.nn.functional.dropout(rows, 0.3) if variant == "dropout" else rows
        out = rows @ weight.T + 0.5 * kept @ a.T @ b.T
        if variant == "dora":
            out = rows @ (magnitude[:, None] * torch.nn.functional.normalize(weight + 0.5 * b @ a)).T
        torch.logsumexp(out.tanh(), -1).sum().backward()
    assert a.grad is not None and b.grad is not None
    return a.detach(), b.detach(), a.grad, b.grad


@pytest.mark.parametrize("variant", ["lora", "dropout", "dora"])
def test_a_complete_capture_satisfies_the_identity(variant: str) -> None:
    torch.manual_seed(0)
    a, b, grad_a, grad_b = lora_gradients(variant)
    assert self_check(a, b, grad_a, grad_b) < 1e-6
    assert self_check(a, b, 0.1 * grad_a, 0.1 * grad_b) < 1e-6  # clipped alike


def test_a_broken_capture_does_not() -> None:
    a, b, grad_a, grad_b = lora_gradients("lora")
    _, _, half_a, _ = lora_gradients("lora", micro_batches=1)
    assert self_check(a, b, half_a, grad_b) > 1e-2  # a micro-batch is missing from one of the two
    assert self_check(a, b, 0.1 * grad_a, grad_b) > 1e-2  # one is clipped
    assert self_check(a + 0.3 * normal(4, 14, seed=9), b, grad_a, grad_b) > 1e-2  # the weights are not of this step


def test_the_check_by_module_and_its_ends() -> None:
    a, b, grad_a, grad_b = (x.repeat(4, 1, 1) for x in lora_gradients("lora"))
    for x in (b, grad_a):
        x[1] = 0  # a fresh adapter
    for x in (grad_a, grad_b):
        x[2] = 0
    grad_b[3, 0, 0] = torch.nan
    found = self_check(a, b, grad_a, grad_b)
    assert (found[:3] < 1e-6).all() and found[2] == 0 and found[3].isnan()
    sixteen = self_check(*(x[0].bfloat16() for x in (a, b, grad_a, grad_b)))
    assert sixteen.dtype == torch.float32 and 1e-6 < sixteen < 0.02  # the rounding of the inputs alone


def test_the_cosine_of_a_constant_gradient_is_one() -> None:
    gradient = normal(3, 4, 6)
    torch.testing.assert_close(cosine(gradient, 5 * gradient, (-2, -1)), torch.ones(3))
    torch.testing.assert_close(cosine(gradient, -gradient, (-2, -1)), -torch.ones(3))
    torch.testing.assert_close(cosine(gradient.flatten(1), gradient.flatten(1), -1), torch.ones(3))
    wanted = torch.cosine_similarity(gradient, normal(3, 4, 6, seed=1), dim=1)
    torch.testing.assert_close(cosine(gradient, normal(3, 4, 6, seed=1), 1), wanted)


def test_the_cosine_with_nothing_is_unknown() -> None:
    x = torch.eye(2)[None].repeat(2, 1, 1)
    x[1] = 0
    found = cosine(x, torch.ones(2, 2, 2), (-2, -1))
    torch.testing.assert_close(found[0], torch.tensor(1 / math.sqrt(2)))
    assert found[1].isnan() and cosine(x, x.bfloat16(), (-2, -1))[0] == 1


def test_adams_update_of_a_constant_gradient_is_one() -> None:
    parameter, gradient = torch.nn.Parameter(torch.zeros(3, 5)), normal(3, 5)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    for step in range(1, 4):
        parameter.grad = gradient.clone()
        optimizer.step()
        second = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**step)
        torch.testing.assert_close(adam_update_rms(gradient, second), torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(adam_update_rms(30 * gradient, second), torch.tensor(30.0), rtol=1e-4, atol=0)


def test_adams_update_by_module_and_without_a_past() -> None:
    gradient = torch.stack([torch.full((2, 2), 3.0), torch.zeros(2, 2), torch.full((2, 2), 1e-6)])
    second = torch.stack([torch.full((2, 2), 4.0), torch.zeros(2, 2), torch.zeros(2, 2)])
    torch.testing.assert_close(adam_update_rms(gradient, second, eps=1e-3), torch.tensor([1.5, 0.0, 1e-3]))
    assert adam_update_rms(gradient, second).isfinite().all()


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


def test_the_cosine_of_updates_is_the_dense_one() -> None:
    a1, b1, a2, b2 = normal(3, 4, 14), normal(3, 10, 4, seed=1), normal(3, 6, 14, seed=2), normal(3, 10, 6, seed=3)
    dense1, dense2 = (-0.5 * b1.double() @ a1.double()).flatten(1), (2 * b2.double() @ a2.double()).flatten(1)
    wanted = torch.cosine_similarity(dense1, dense2, dim=1)
    torch.testing.assert_close(update_cosine(a1, b1, -0.5, a2, b2, 2.0), wanted)
    torch.testing.assert_close(update_cosine(a1, b1, 1.0, a1.flip(-2), b1.flip(-1), 9.0), torch.ones(3).double())
    assert update_cosine(a1, b1, 1.0, a2, torch.zeros_like(b2), 1.0).isnan().all()
    sixteen = update_cosine(a1.bfloat16(), b1.bfloat16(), -0.5, a2.bfloat16(), b2.bfloat16(), 2.0)
    torch.testing.assert_close(sixteen, wanted, rtol=0.05, atol=0.01)
