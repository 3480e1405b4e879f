"""The loss and the gradient that is formed on the way equal those of full logits, however they are cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy, linear

from training_lens.models.fast import losses

linear_nll = jaxtyped(typechecker=beartype)(losses.linear_nll)
nll = jaxtyped(typechecker=beartype)(losses.nll)
pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", 400)
    monkeypatch.setattr(losses, "CACHED", 20)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS, TARGETS = drawn(19, 6, seed=1), drawn(19, seed=2), torch.tensor([3, 0, 18, 3, 7])


def capped(states: Tensor) -> Tensor:
    return 2.0 * torch.tanh(linear(states, WEIGHT) / 2.0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [None, BIAS])
def test_linear_nll_is_the_sum_of_the_cross_entropy(bias: Tensor | None) -> None:
    states = drawn(5, 6).requires_grad_()
    wanted = cross_entropy(linear(states, WEIGHT, bias), TARGETS, reduction="sum")
    total, terms = linear_nll(states, WEIGHT, bias, TARGETS)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms, cross_entropy(linear(states, WEIGHT, bias), TARGETS, reduction="none").detach())
    assert not terms.requires_grad
    assert gradcheck(lambda states: linear_nll(states, WEIGHT, bias, TARGETS)[0], (states,))


@pytest.mark.usefixtures("small_chunks")
def test_nll_takes_any_way_to_logits() -> None:
    states = drawn(5, 6).requires_grad_()
    wanted = cross_entropy(capped(states), TARGETS, reduction="sum")
    total, terms = nll(states, capped, TARGETS)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms, cross_entropy(capped(states), TARGETS, reduction="none").detach())
    assert gradcheck(lambda states: nll(states, capped, TARGETS)[0], (states,))


@pytest.mark.parametrize(
    "way", [lambda s: linear_nll(s, WEIGHT, None, TARGETS[:0])[0], lambda s: nll(s, capped, TARGETS[:0])[0]]
)
def test_no_target_is_no_loss(way: Callable[[Tensor], Tensor]) -> None:
    states = drawn(0, 6).requires_grad_()
    loss = way(states)
    loss.backward()
    assert float(loss.detach()) == 0.0 and states.grad is not None and states.grad.shape == (0, 6)


def test_a_scaled_loss_has_a_scaled_gradient() -> None:
    one, other = drawn(5, 6).requires_grad_(), drawn(5, 6).requires_grad_()
    linear_nll(one, WEIGHT, None, TARGETS)[0].backward()
    (linear_nll(other, WEIGHT, None, TARGETS)[0] / 7).backward()
    assert one.grad is not None
    torch.testing.assert_close(other.grad, one.grad / 7)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_scale_that_float16_cannot_hold_gives_finite_gradients(scale: float) -> None:
    """A scaler begins with 65536; where a step has one target, nothing divides it."""
    states, weight, target = (0.01 * drawn(1, 6)).half().requires_grad_(), 0.1 * WEIGHT, TARGETS[:1]
    (scale * linear_nll(states, weight.half(), None, target)[0]).backward()
    exact = states.detach().double().requires_grad_()
    (scale * cross_entropy(linear(exact, weight), target, reduction="sum")).backward()
    assert states.grad is not None and exact.grad is not None
    torch.testing.assert_close(states.grad.double(), exact.grad, rtol=1e-2, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("device", "vocabulary", "itemsize", "rows"),
    [("cpu", 32_000, 2, 458), ("cuda", 32_000, 2, 4194), ("cuda", 128_256, 2, 1046), ("mps", 262_144, 4, 256)],
)
def test_a_gpu_reads_the_output_layer_for_a_thousand_rows_at_a_time(
    device: str, vocabulary: int, itemsize: int, rows: int
) -> None:
    assert losses.chunk_rows(torch.device(device), vocabulary, itemsize) == rows


def test_sums_by_example_are_those_of_a_loop() -> None:
    counts, terms = torch.tensor([3, 0, 1, 5, 0]), drawn(9)
    wanted = torch.stack([part.sum() for part in terms.split(counts.tolist())])
    torch.testing.assert_close(losses.sum_by_example(terms, counts), wanted)
    assert losses.sum_by_example(drawn(0), counts[:0]).shape == (0,)
    assert losses.sum_by_example(drawn(0), counts[1:2]).tolist() == [0.0]
