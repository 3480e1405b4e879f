"""Kernels in C give what transformers' own operations give, bit by bit where only the order of a sum differs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from training_lens.models.fast.native import library as calls
from training_lens.models.fast.native import training_kernels as training

pytestmark = pytest.mark.skipif(calls.load_library() is None, reason="no C compiler here")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Tensor, wanted: Tensor) -> float:
    return (found == wanted).double().mean().item()


def test_the_norm_of_bf16_rounds_where_transformers_does() -> None:
    norm = LlamaRMSNorm(576, 1e-5).bfloat16()
    norm.weight.data = drawn(576, seed=1)
    x = drawn(300, 576)
    found, scale = training.rms_norm(x, norm.weight, 1e-5)
    assert same(found, norm(x)) > 0.999  # sums in another order
    torch.testing.assert_close(scale, x.float().square().mean(-1, keepdim=True).add(1e-5).rsqrt())


def test_the_gate_of_bf16_rounds_where_transformers_does() -> None:
    gate_up = drawn(300, 128) * 4
    gate, up = gate_up.chunk(2, -1)
    assert same(training.apply_gate(gate_up, "silu"), silu(gate) * up) > 0.999


def test_rotary_positions_of_bf16_round_where_transformers_does() -> None:
    together = drawn(5, 7, 64)
    angles = torch.cat([torch.rand(5, 32) * 6] * 2, -1)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    q, k = (t.transpose(0, 1)[None] for t in together.split([4, 3], 1))
    wanted = torch.cat([t[0].transpose(0, 1) for t in apply_rotary_pos_emb(q, k, cos[None], sin[None])], 1)
    found = torch.empty_like(together)
    training.rotate_heads(together, cos, sin, 1.0, found)
    assert torch.equal(found, wanted)


def test_neighbours_of_bf16_round_where_cohere_does() -> None:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_to_neighbours

    q, angles = drawn(5, 4, 64), (torch.rand(5, 32) * 6).repeat_interleave(2, -1)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    wanted, _ = apply_to_neighbours(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos[None], sin[None])
    found = torch.empty_like(q)
    training.rotate_heads(q, cos, sin, 1.0, found, interleaved=True)
    assert same(found, wanted[0].transpose(0, 1)) > 0.999


def by_tanh(x: Tensor) -> Tensor:
    """GELU as x sigmoid(2 u), which 0.5 x (1 + tanh u) is; torch computes the latter, and has no digits far below 0."""
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))


@pytest.mark.parametrize(("name", "activation", "most"), [("silu", silu, 1e-6), ("gelu_tanh", by_tanh, 3e-5)])
def test_activations_hold_over_all_of_float(name: str, activation: Callable[[Tensor], Tensor], most: float) -> None:
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-0.0, 1e-30, torch.nan])])
    found = training.apply_gate(torch.stack([x, torch.ones_like(x)]).T.contiguous(), name)[:, 0]
    torch.testing.assert_close(found.double(), activation(x.double()), rtol=most, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("far", [1.0, 50.0, 1000.0])
def test_the_loss_of_far_logits_is_finite_and_right(far: float) -> None:
    logits, targets = drawn(7, 1003, dtype=torch.float32) * far, torch.arange(7) * 100
    wide = logits.double().requires_grad_()
    wanted = cross_entropy(wide, targets, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), wide)
    losses = training.write_nll_gradient(logits, targets)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_a_number_that_is_none_stays_so() -> None:
    x = drawn(2, 64)
    x[1, 3] = torch.nan
    found, _ = training.rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-5)
    assert found[0].isfinite().all() and found[1].isnan().all()
