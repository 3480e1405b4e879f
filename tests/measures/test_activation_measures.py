"""Rotation, identity and independence have known answers; the divergence is that of torch's distributions."""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from training_lens.measures import activation_measures as activations
from training_lens.models.token_scores import forward_kl as plain_forward_kl

checked = jaxtyped(typechecker=beartype)
rms, drift, linear_cka = checked(activations.rms), checked(activations.drift), checked(activations.linear_cka)
forward_kl, projection = checked(plain_forward_kl), checked(activations.random_projection)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rms_of_known_states() -> None:
    h = torch.stack([torch.full((3, 4), -2.0), torch.zeros(3, 4)])
    assert rms(h).tolist() == [2.0, 0.0]
    assert rms(h.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(rms(h[0]), torch.tensor(2.0))


def test_drift_is_relative_to_the_base_and_zero_where_nothing_moved() -> None:
    h0 = normal(2, 5, 8)
    assert drift(h0, h0).tolist() == [0.0, 0.0]
    torch.testing.assert_close(drift(1.25 * h0, h0), torch.full((2,), 0.25))
    h = h0 + normal(2, 5, 8, seed=1)
    torch.testing.assert_close(drift(h, h0), ((h - h0).flatten(1).norm(dim=1) / h0.flatten(1).norm(dim=1)))


def test_small_drift_of_sixteen_bit_states_is_not_rounded_again() -> None:
    h0 = torch.full((4, 8), 256.0, dtype=torch.bfloat16)
    h = h0.clone()
    h[0, 0] = 258.0  # the next number that bfloat16 has
    torch.testing.assert_close(drift(h, h0), torch.tensor(2 / (256 * 32**0.5)))


def test_rotation_scale_and_shift_leave_cka_at_one() -> None:
    x = normal(3, 12, 7)
    turn = torch.linalg.qr(normal(7, 7, seed=1)).Q
    found = linear_cka(x, 3 * x @ turn + 50)
    assert found.samples == 12
    torch.testing.assert_close(found.value, torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)


def test_cka_of_independent_representations_is_zero_on_average_however_wide() -> None:
    x, y = normal(400, 8, 64), normal(400, 8, 64, seed=1)
    assert abs(linear_cka(x, y).value.mean()) < 0.02
    biased = [_hsic_plain(x[0], y[0]) / (_hsic_plain(x[0], x[0]) * _hsic_plain(y[0], y[0])) ** 0.5]
    assert biased[0] > 0.7  # what debiasing is for


def _hsic_plain(x: Tensor, y: Tensor) -> Tensor:
    centre = torch.eye(len(x)) - 1 / len(x)
    return (centre @ x @ x.T @ centre * (centre @ y @ y.T @ centre)).sum()


def test_cka_is_the_ratio_of_the_unbiased_estimators() -> None:
    x, y = normal(9, 5), normal(9, 6, seed=1) + normal(9, 1, seed=2)
    wanted = _hsic_unbiased(x, y) / (_hsic_unbiased(x, x) * _hsic_unbiased(y, y)).sqrt()
    torch.testing.assert_close(linear_cka(x, y).value, wanted)


def _hsic_unbiased(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. 2012, theorem 5, as it is printed."""
    n = len(x)
    k, l = ((z.double() @ z.double().T).fill_diagonal_(0) for z in (x, y))  # noqa: E741
    one = torch.ones(n, dtype=torch.float64)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return ((k * l).sum() + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def test_too_few_samples_give_nan() -> None:
    assert linear_cka(normal(2, 3, 5), normal(2, 3, 5)).value.isnan().tolist() == [True, True]
    assert linear_cka(normal(4, 5), normal(4, 5)).value == 1.0
    assert linear_cka(torch.ones(6, 5), normal(6, 5)).value.isnan()


def test_the_divergence_is_that_of_the_distributions() -> None:
    base, adapter = normal(2, 3, 11), normal(2, 3, 11, seed=1)
    wanted = kl_divergence(Categorical(logits=base), Categorical(logits=adapter))
    torch.testing.assert_close(forward_kl(base, adapter), wanted)
    torch.testing.assert_close(forward_kl(base.bfloat16(), adapter), wanted, rtol=0.05, atol=0.01)


def test_equal_logits_have_no_divergence_at_all() -> None:
    assert forward_kl(normal(4, 9), normal(4, 9)).tolist() == [0.0] * 4


def test_a_token_that_is_ruled_out_adds_nothing_and_nan_stays() -> None:
    base = torch.tensor([0.0, 0.0, -torch.inf])
    assert forward_kl(base, base) == 0
    torch.testing.assert_close(forward_kl(base, torch.zeros(3)), torch.tensor(1.5).log())
    assert forward_kl(torch.zeros(3), base).isinf()  # the adapter rules out what the base does not
    assert forward_kl(base, torch.tensor([0.0, torch.nan, 0.0])).isnan()


def test_projection_is_fixed_and_keeps_lengths() -> None:
    state = torch.get_rng_state()
    mapping = projection(300, 64, seed=7)
    assert torch.equal(mapping, projection(300, 64, seed=7)) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(mapping, projection(300, 64, seed=8))
    h = normal(500, 300)
    assert ((h @ mapping).square().sum() / h.square().sum()).item() == pytest.approx(1, rel=0.05)
