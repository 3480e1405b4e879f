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
noise_scale, adam_update_rms = checked(directions.noise_scale), checked(directions.adam_update_rms)
importance_step = checked(directions.importance_step)


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


def test_the_noise_scale_of_normal_gradients() -> None:
    # g ~ N(mu, sigma^2 I) in d dimensions: noise d sigma^2, signal ||mu||^2
    mean, sigma, small, big = 0.5 * torch.ones(50), 2.0, 4, 32
    examples = mean + sigma * normal(2000, big, 50)
    means = examples.unflatten(1, (-1, small)).mean(2)  # (steps, micro-batches, d)
    small_sq, big_sq = means.square().sum(-1).mean(1), examples.mean(1).square().sum(-1)
    each = noise_scale(small_sq, big_sq, small, big)
    torch.testing.assert_close(each.noise.mean(), torch.tensor(50 * sigma**2), rtol=0.02, atol=0)
    torch.testing.assert_close(each.signal.mean(), torch.tensor(12.5), rtol=0.02, atol=0)
    averaged = noise_scale(small_sq.mean(), big_sq.mean(), small, big)
    torch.testing.assert_close(averaged.scale, torch.tensor(50 * 4 / 12.5), rtol=0.03, atol=0)


def test_an_undetermined_noise_scale_is_nan() -> None:
    drowned = noise_scale(torch.tensor([9.0, 2.0]), torch.tensor([1.0, 1.5]), 1, 2)
    assert drowned.signal.tolist() == [-7.0, 1.0] and drowned.scale[0].isnan() and drowned.scale[1] == 1.0
    single = noise_scale(torch.tensor(2.0), torch.tensor(2.0), 8, 8)
    assert single.signal.isnan() and single.noise.isnan() and single.scale.isnan()


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


def test_the_uncertainty_of_a_constant_gradient_goes_to_zero() -> None:
    weight, gradient, state = normal(4, 6), normal(4, 6, seed=1), None
    first = importance_step(None, weight, gradient)
    for _ in range(200):
        state = importance_step(state, weight, gradient)
    assert state is not None
    torch.testing.assert_close(state.sensitivity, (weight * gradient).abs())
    assert state.uncertainty.max() < 1e-4 * first.uncertainty.max()
    assert state.importance.max() < 1e-4


def test_importance_follows_its_equations() -> None:
    state = importance_step(None, torch.tensor([2.0]), torch.tensor([-3.0]), beta1=0.5, beta2=0.75)
    assert (state.sensitivity, state.uncertainty, state.importance) == (3.0, 0.75, 2.25)
    after = importance_step(state, torch.tensor([2.0]), torch.tensor([1.0]), beta1=0.5, beta2=0.75)
    assert (after.sensitivity, after.uncertainty) == (2.5, 0.75 * 0.75 + 0.25 * 0.5)
    assert state.sensitivity == 3.0  # what was is not changed
