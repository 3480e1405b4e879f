"""Spectra, norms and directions of dW from its factors equal those of the dense matrices, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.linalg import matrix_norm

from training_lens.measures import singular_values as spectra
from training_lens.measures.factors import Grams

checked = jaxtyped(typechecker=beartype)
singular_values, singular_vectors = checked(spectra.singular_values), checked(spectra.singular_vectors)
effective_rank, stable_rank, energy_rank = map(
    checked, (spectra.effective_rank, spectra.stable_rank, spectra.energy_rank)
)
update_norm, step_norm = checked(spectra.update_norm), checked(spectra.step_norm)
top_ratio, truncate = checked(spectra.top_ratio), checked(spectra.truncate_rank)
top_singular_value, amplification = checked(spectra.top_singular_value), checked(spectra.amplification)
intruders, dora_change = checked(spectra.find_intruders), checked(spectra.dora_change)


def balance(a: Tensor, b: Tensor) -> Tensor:
    return checked(spectra.balance)(Grams.from_factors(a, b))


# in, out, rank, leading dimensions; the last two have a rank above what in or out allow
SHAPES = [(24, 16, 4, ()), (16, 24, 4, (3,)), (12, 12, 1, (2, 2)), (6, 20, 9, (2,)), (20, 5, 9, ())]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(inputs: int, outputs: int, rank: int, batch: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(*batch, rank, inputs, seed=seed), normal(*batch, outputs, rank, seed=seed + 1)


def dense(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return scaling * b.double() @ a.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_dense_matrix(shape: tuple[int, int, int, tuple[int, ...]]) -> None:
    a, b = factors(*shape)
    found = singular_values(a, b, 0.5)
    assert found.shape == (*shape[3], min(shape[:3]))
    torch.testing.assert_close(found, torch.linalg.svdvals(dense(a, b, 0.5))[..., : found.shape[-1]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [2.0, -0.5])
def test_singular_vectors_rebuild_the_change(shape: tuple[int, int, int, tuple[int, ...]], scaling: float) -> None:
    a, b = factors(*shape)
    u, singular, v = singular_vectors(a, b, scaling)
    torch.testing.assert_close(u @ singular.diag_embed() @ v.mT, dense(a, b, scaling))
    eye = torch.eye(singular.shape[-1], dtype=torch.float64).expand(*shape[3], -1, -1)
    for vectors in (u, v):
        torch.testing.assert_close(vectors.mT @ vectors, eye)
    torch.testing.assert_close(singular, singular_values(a, b, scaling))


def test_sixteen_bit_factors_are_taken_at_their_own_values() -> None:
    a, b = (x.bfloat16() for x in factors(24, 16, 4))
    torch.testing.assert_close(singular_values(a, b, 1.0), torch.linalg.svdvals(dense(a, b, 1.0))[:4])
    torch.testing.assert_close(update_norm(a, b, 1.0), matrix_norm(dense(a, b, 1.0)))
    torch.testing.assert_close(step_norm(a, b, a * 2, b, 1.0), matrix_norm(dense(a, b, 1.0)).float())


def test_factors_that_cancel_have_no_spectrum_and_no_norm() -> None:
    a, b = factors(96, 64, 8)
    a, b = torch.cat([a, a]), torch.cat([b, -b], 1)  # PiSSA before its first step
    assert singular_values(a, b, 1.0).tolist() == [0.0] * 16
    assert update_norm(a, b, 1.0) < 1e-7 * matrix_norm(a) * matrix_norm(b)


def test_a_small_change_of_factors_that_cancel_keeps_its_digits() -> None:
    a, b = factors(96, 64, 8)
    a, b = torch.cat([a, a]), torch.cat([b + 1e-4 * normal(64, 8, seed=5), -b], 1)
    torch.testing.assert_close(update_norm(a, b, 1.0), matrix_norm(dense(a, b, 1.0)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equal_singular_values_give_their_number_for_both_ranks(k: int) -> None:
    spectrum = torch.tensor([0.3] * k + [0.0] * (8 - k), dtype=torch.float64)
    torch.testing.assert_close(effective_rank(spectrum), torch.tensor(float(k), dtype=torch.float64))
    torch.testing.assert_close(stable_rank(spectrum), torch.tensor(float(k), dtype=torch.float64))
    assert energy_rank(spectrum, 1.0) == k


def test_ranks_of_a_known_spectrum() -> None:
    spectrum = torch.tensor([[4.0, 2.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    torch.testing.assert_close(effective_rank(spectrum), torch.tensor([math.exp(entropy), 1.0]))
    torch.testing.assert_close(stable_rank(spectrum), torch.tensor([22 / 16, 1.0]))
    assert energy_rank(spectrum, 0.5).tolist() == [1, 1]  # 16 of 22
    assert energy_rank(spectrum, 0.9).tolist() == [2, 1]  # 20 of 22
    assert energy_rank(spectrum, 0.95).tolist() == [3, 1]
    assert energy_rank(spectrum, 1.0).tolist() == [4, 1]


@pytest.mark.parametrize("measure", [effective_rank, stable_rank, energy_rank])
def test_ranks_of_nothing_are_zero_and_of_nan_are_nan(measure: object) -> None:
    spectrum = torch.zeros(2, 4)
    spectrum[1] = torch.nan
    ranks = measure(spectrum)  # type: ignore[operator]
    assert ranks[0] == 0 and ranks[1].isnan()


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_are_those_of_the_dense_matrices(shape: tuple[int, int, int, tuple[int, ...]]) -> None:
    (a0, b0), (a1, b1) = factors(*shape), factors(*shape, seed=7)
    torch.testing.assert_close(update_norm(a0, b0, -2.0), matrix_norm(dense(a0, b0, -2.0)))
    moved = matrix_norm(dense(a1, b1, 0.5) - dense(a0, b0, 0.5))
    torch.testing.assert_close(step_norm(a0, b0, a1, b1, 0.5).double(), moved, rtol=1e-5, atol=0)


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-6])
def test_a_small_step_keeps_its_digits(relative: float) -> None:
    a0, b0 = factors(768, 512, 16, (3,))
    a1, b1 = a0 + relative * normal(3, 16, 768, seed=4), b0 + relative * normal(3, 512, 16, seed=5)
    wanted = matrix_norm(dense(a1, b1, 2.0) - dense(a0, b0, 2.0))
    torch.testing.assert_close(step_norm(a0, b0, a1, b1, 2.0).double(), wanted, rtol=1e-5, atol=0)


def test_a_known_step_of_rank_one() -> None:
    a, b = torch.zeros(2, 4), torch.zeros(3, 2)
    a[0, 1] = 3.0
    moved = b.clone()
    moved[2, 0] = 2.0  # dW goes from 0 to 0.5 x 2 x 3 in one place
    assert step_norm(a, b, a, moved, 0.5) == 3.0 == update_norm(a, moved, 0.5)
    assert step_norm(a, moved, a, moved, 0.5) == 0.0


def test_strength_on_diagonal_matrices() -> None:
    weight, a, b = torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2), torch.diag(torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(update_norm(a, b, 2.0).float() / matrix_norm(weight), torch.tensor(0.4))
    top = singular_values(a, b, 2.0)[..., 0] / top_singular_value(weight).double()
    torch.testing.assert_close(top, torch.tensor(0.4, dtype=torch.float64))


def test_one_step_of_descent_changes_the_balance_by_its_rate_squared() -> None:
    root, rate = normal(8, 4, dtype=torch.float64), 0.03
    a, b = root.mT.clone().requires_grad_(), root.clone().requires_grad_()  # balanced: A A^T = B^T B
    target = normal(8, 8, seed=3, dtype=torch.float64)
    (b @ a - target).square().sum().backward()
    assert balance(a.detach(), b.detach()) < 1e-12
    wanted = rate**2 * matrix_norm(a.grad @ a.grad.mT - b.grad.mT @ b.grad)
    torch.testing.assert_close(balance((a - rate * a.grad).detach(), (b - rate * b.grad).detach()), wanted)


def test_top_ratio_is_that_of_the_dense_norms() -> None:
    a, b = factors(12, 9, 4, (3,))
    wanted = matrix_norm(b, 2) / matrix_norm(a, 2)
    torch.testing.assert_close(top_ratio(a, b), wanted)
    assert top_ratio(a, torch.zeros_like(b)).tolist() == [0.0] * 3
    assert top_ratio(torch.zeros_like(a), b).isinf().all()


def test_the_largest_singular_value_comes_within_a_percent_from_below() -> None:
    flat = normal(2, 300, 200)
    decaying = torch.diag(torch.arange(1, 201) ** -0.5)
    close = torch.diag(1 - torch.arange(200) * 1e-3)  # two hundred values, a thousandth apart
    wide, one = normal(600, 1600), normal(40, 1) @ normal(1, 30)
    same, few, none = torch.eye(50), normal(60, 4) @ normal(4, 50), torch.zeros(4, 6)  # no more directions than these
    small = (normal(5, 3), normal(3, 5), normal(1, 7), one, same, few, none)
    for weight in (flat, flat.mT.contiguous(), wide, decaying, close, flat.bfloat16(), *small):
        true = matrix_norm(weight.float(), 2)
        found = top_singular_value(weight)
        assert (found <= true * (1 + 1e-5)).all() and (found >= 0.99 * true).all()
    assert top_singular_value(torch.full((3, 3), torch.nan)).isnan()


def test_the_largest_singular_value_repeats_itself_and_leaves_torchs_random_state() -> None:
    weight, state = normal(40, 30), torch.get_rng_state()
    assert top_singular_value(weight) == top_singular_value(weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_amplification_of_a_rank_one_update_on_a_diagonal() -> None:
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    a[0, 1], b[1, 0] = 1.0, 5.0
    for k in (1, 2):  # its second direction does not exist and counts for nothing
        torch.testing.assert_close(amplification(weight, a, b, 2.0, k).item(), 5.0)  # 10 where W has 2
    assert amplification(weight, a, torch.zeros_like(b), 2.0, 1).isnan()


def test_amplification_is_that_of_the_dense_matrices() -> None:
    a, b = factors(14, 10, 4, (3,))
    weight = normal(3, 10, 14, seed=8)
    u, singular, vh = torch.linalg.svd(dense(a, b, 0.5))
    met = matrix_norm(u[..., :2].mT @ weight.double() @ vh[..., :2, :].mT)
    torch.testing.assert_close(amplification(weight, a, b, 0.5, 2), singular.norm(dim=-1) / met, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("spike", "found"), [(5.0, 0), (6.0, 1)])
def test_a_spike_is_an_intruder_once_it_outgrows_what_the_weight_had_there(spike: float, found: int) -> None:
    weight = torch.cat([torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(1, 3)])
    a, b = torch.tensor([[spike, 0.0, 0.0]]), torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    result = intruders(weight, a, b, 1.0)
    first = 3 / math.hypot(3, spike)  # 0.514 at 5, 0.447 at 6
    torch.testing.assert_close(result.cosines, torch.tensor([first, 1.0, 1.0]))
    assert result.count == found
    energy = 9 + spike**2
    torch.testing.assert_close(result.energy_share, torch.tensor(found * energy / (energy + 4 + 1)))
    assert intruders(weight, a, b, 1.0, k=2, threshold=1.1).energy_share == 1.0


def test_a_direction_without_a_singular_value_is_none_of_the_weights() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    a, b = torch.tensor([[6.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    result = intruders(weight, a, b, 1.0)
    assert result.count == 1  # nor is the fourth, which W + dW lacks
    torch.testing.assert_close(result.cosines[:3], torch.tensor([3 / math.hypot(3, 6), 1.0, 1.0]))


def test_no_change_has_no_intruders() -> None:
    weight = normal(2, 12, 9)
    a, b = normal(2, 3, 9, seed=1), torch.zeros(2, 12, 3)
    result = intruders(weight, a, b, 1.0, k=4)
    assert result.count.tolist() == [0, 0] == result.energy_share.tolist()
    torch.testing.assert_close(result.cosines, torch.ones(2, 4))
    assert intruders(torch.diag(torch.tensor([3.0, 0.0])), torch.ones(1, 2), torch.zeros(2, 1), 1.0).count == 0


def test_dora_change_is_that_of_the_dense_matrices() -> None:
    a, b = factors(14, 10, 4, (3,))
    weight, magnitude = normal(3, 10, 14, seed=8), normal(3, 10, seed=9).abs()
    before = weight.double()
    after = before + dense(a, b, 0.5)
    stretched, turned = dora_change(weight, a, b, 0.5, magnitude)
    torch.testing.assert_close(stretched, (magnitude - before.norm(dim=-1)).abs().mean(-1))
    cosines = torch.cosine_similarity(before, after, dim=-1)
    torch.testing.assert_close(turned, (1 - cosines).mean(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [1e-4, 1.0, -0.5])
def test_a_change_along_the_weight_turns_nothing(factor: float) -> None:
    a, b = factors(14, 10, 4)
    weight = (b.double() @ a.double()).float()
    stretched, turned = dora_change(weight, a, b, factor, weight.norm(dim=-1))
    assert turned.abs() < 1e-7 and stretched < 1e-6


def test_a_small_turn_keeps_its_digits() -> None:
    weight, a, b = torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([[1e-5], [0.0]])
    _, turned = dora_change(weight, a, b, 1.0, torch.ones(2))
    assert turned.item() == pytest.approx(float(b[0, 0]) ** 2 / 4, rel=1e-5)  # one row of two turns, by 1e-5


def test_a_row_turned_round_or_gone_to_zero() -> None:
    weight, a = torch.eye(2), torch.tensor([[1.0, 0.0]])
    assert dora_change(weight, a, torch.tensor([[-3.0], [0.0]]), 1.0, torch.ones(2))[1] == 1.0  # 1 - cos = 2, and 0
    assert dora_change(weight, a, torch.tensor([[-1.0], [0.0]]), 1.0, torch.ones(2))[1] == 0.0


def test_nan_in_one_module_stays_there() -> None:
    a, b = factors(12, 10, 3, (2,))
    weight = normal(2, 10, 12, seed=2)
    a[0, 1, 2] = torch.nan
    broken = intruders(weight, a, b, 1.0)
    measured = [
        singular_values(a, b, 1.0).sum(-1),
        update_norm(a, b, 1.0),
        step_norm(a, b, a, b, 1.0),
        balance(a, b),
        top_ratio(a, b),
        amplification(weight, a, b, 1.0, 2),
        broken.count,
        broken.energy_share,
        *dora_change(weight, a, b, 1.0, a.new_ones(2, 10))[1:],
        top_singular_value(a),
    ]
    for values in measured:
        assert values[0].isnan() and values[1].isfinite()


def test_empty_batches_give_empty_measures() -> None:
    a, b = factors(12, 10, 3, (2,))
    b = torch.zeros_like(b)
    assert not singular_values(a, b, 1.0).any() and not update_norm(a, b, 1.0).any()
    assert singular_vectors(a, b, 1.0)[0].isfinite().all()
    assert not top_singular_value(torch.zeros(4, 4)).any()


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
