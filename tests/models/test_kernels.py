"""Every kernel's gradient is that of its formula, in float64, and its result that of the plain operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.functional import gelu, linear, silu

from training_lens.models.fast import kernels

lora_linear = jaxtyped(typechecker=beartype)(kernels.lora_linear)
row_norms = jaxtyped(typechecker=beartype)(kernels.row_norms)
gained = jaxtyped(typechecker=beartype)(kernels.scale_outputs)
rms_norm = jaxtyped(typechecker=beartype)(kernels.rms_norm)
gated = jaxtyped(typechecker=beartype)(kernels.apply_gate)
rotate = jaxtyped(typechecker=beartype)(kernels.apply_rotary)
pytestmark = pytest.mark.usefixtures("both_ways")


def drawn(*shape: int, seed: int = 0, grad: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def plain_lora(x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Projections one by one, in the order of eq. 3 of arXiv 2106.09685, with the scales 0.5 and 2."""
    parts = weight.split([b.shape[0] for _, b in factors])
    biases = [None] * len(parts) if bias is None else bias.split([b.shape[0] for _, b in factors])
    several = zip(parts, biases, factors, (0.5, 2.0), strict=False)
    return torch.cat([linear(x, w, c) + s * linear(linear(x, a), b) for w, c, (a, b), s in several], -1)


@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lora_linear_is_the_formula_and_so_is_its_gradient(projections: int, with_bias: bool) -> None:
    shapes = [(5, 3), (4, 2)][:projections]  # out, rank
    x = drawn(2, 6, 7, grad=True)
    weight = drawn(sum(out for out, _ in shapes), 7, seed=1)
    bias = drawn(len(weight), seed=2) if with_bias else None
    flat = [drawn(*size, seed=i, grad=True) for i, (out, r) in enumerate(shapes) for size in ((r, 7), (out, r))]

    def fused(x: Tensor, *flat: Tensor) -> Tensor:
        factors = list(zip(flat[::2], flat[1::2], strict=True))
        return lora_linear(x, weight, bias, factors, (0.5, 2.0)[:projections])

    wanted = plain_lora(x, weight, bias, list(zip(flat[::2], flat[1::2], strict=True)))
    torch.testing.assert_close(fused(x, *flat), wanted, rtol=1e-12, atol=1e-12)
    assert gradcheck(fused, (x, *flat))


def test_lora_linear_forms_no_gradient_of_an_input_that_needs_none() -> None:
    a, b = drawn(2, 7, grad=True), drawn(5, 2, grad=True)
    y = lora_linear(drawn(3, 7), drawn(5, 7), None, [(a, b)], [1.0])
    y.sum().backward()
    assert a.grad is not None and b.grad is not None


def test_lora_linear_gives_dropped_inputs_to_the_branch_alone() -> None:
    x, dropped = drawn(3, 7, grad=True), drawn(3, 7, seed=5, grad=True)
    weight, a, b = drawn(5, 7, seed=1), drawn(2, 7, seed=2, grad=True), drawn(5, 2, seed=3, grad=True)

    def fused(x: Tensor, dropped: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, weight, None, [(a, b)], [0.5], dropped)

    wanted = linear(x, weight) + 0.5 * linear(linear(dropped, a), b)
    torch.testing.assert_close(fused(x, dropped, a, b), wanted, rtol=1e-12, atol=1e-12)
    assert gradcheck(fused, (x, dropped, a, b))


def test_lora_linear_keeps_factors_and_their_gradients_in_float32_under_bf16() -> None:
    a, b = drawn(2, 64, grad=True, dtype=torch.float32), drawn(8, 2, grad=True, dtype=torch.float32)
    y = lora_linear(drawn(3, 64, dtype=torch.bfloat16), drawn(8, 64, dtype=torch.bfloat16), None, [(a, b)], [1.0])
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and a.grad is not None and a.grad.dtype == torch.float32


@pytest.mark.parametrize("at_once", [1, 14, 2**18])
def test_row_norms_are_those_of_the_sum_in_blocks_of_any_size(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.SUMS_AT_ONCE, "cpu", at_once)
    weight, a, b = drawn(5, 7), drawn(2, 7, seed=1), drawn(5, 2, seed=2)
    wanted = torch.linalg.norm(weight + 0.5 * b @ a, dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, 0.5), wanted, rtol=1e-12, atol=1e-12)


def test_row_norms_of_bf16_weights_are_exact_where_the_parts_cancel() -> None:
    a, b = drawn(4, 64, dtype=torch.float32), drawn(8, 4, seed=1, dtype=torch.float32)
    weight = (-b @ a).to(torch.bfloat16)  # what is left of the sum is the rounding of the weight
    wanted = torch.linalg.norm(weight.double() + b.double() @ a.double(), dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, 1.0).double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gained_is_the_formula_and_so_is_its_gradient(with_bias: bool) -> None:
    z, gains, bias = drawn(2, 3, 5, grad=True), drawn(5, seed=1, grad=True), drawn(5, seed=2) if with_bias else None
    wanted = z * gains + (0 if bias is None else bias)
    torch.testing.assert_close(gained(z, gains, bias), wanted, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda z, gains: gained(z, gains, bias), (z, gains))


def test_the_gradient_of_gains_is_summed_in_their_dtype_under_bf16() -> None:
    z, gains = drawn(4096, 3, dtype=torch.bfloat16), drawn(3, seed=1, grad=True, dtype=torch.float32)
    dy = drawn(4096, 3, seed=2, dtype=torch.bfloat16)
    gained(z, gains).backward(dy)
    assert gains.grad is not None and gains.grad.dtype == torch.float32
    wanted = (dy.double() * z.double()).sum(0).float()
    torch.testing.assert_close(gains.grad, wanted, rtol=0, atol=4e-3 * 4096**0.5)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def test_rms_norm_is_the_formula_and_so_is_its_gradient() -> None:
    x, weight = drawn(2, 5, 7, grad=True), drawn(7, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), plain_norm(x, weight), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda x: rms_norm(x, weight, 1e-6), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(128).to(dtype)
    nn.init.normal_(module.weight)
    x = drawn(50, 128, dtype=dtype)
    wanted = module(x)
    found = rms_norm(x, module.weight.detach(), module.variance_epsilon)
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if dtype != torch.float32:
        assert (found == wanted).float().mean() > 0.99  # a sum in another order may round otherwise, rarely


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_with_a_weight_of_float32_equals_that_of_gemma(dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    module = Gemma3RMSNorm(128).to(dtype).requires_grad_(False)
    module.weight.copy_(drawn(128, seed=2, dtype=dtype))
    x, dy = drawn(50, 128, dtype=dtype, grad=True), drawn(50, 128, seed=1, dtype=dtype)
    wanted, found = module(x), rms_norm(x, module.weight.float() + 1, module.eps)
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    if dtype != torch.float32:
        assert (found == wanted).float().mean() > 0.99
    (dx,), (plain,) = torch.autograd.grad(found, x, dy), torch.autograd.grad(wanted, x, dy)
    torch.testing.assert_close(dx, plain, rtol=0, atol=4 * torch.finfo(dtype).eps * float(plain.abs().max()))


def test_rms_norm_sums_squares_beyond_the_range_of_fp16() -> None:
    x = torch.full((1, 64), 6e4, dtype=torch.float16)
    assert torch.isfinite(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6)).all()


@pytest.mark.parametrize(
    ("name", "activation"), [("silu", silu), ("gelu", gelu), ("gelu_tanh", partial(gelu, approximate="tanh"))]
)
def test_gated_is_the_formula_and_so_is_its_gradient(name: str, activation: Callable[[Tensor], Tensor]) -> None:
    x = drawn(2, 3, 10, grad=True)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(gated(x, name), activation(gate) * up, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda x: gated(x, name), (x,))


@pytest.mark.parametrize("turned", [4, 6])
def test_rotate_turns_pairs_by_their_angle_and_back_in_its_gradient(turned: int) -> None:
    x, angles = drawn(5, 2, 6, grad=True), drawn(5, turned // 2, seed=1)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    y = rotate(x, cos, sin)
    pairs = torch.complex(x[..., : turned // 2], x[..., turned // 2 : turned]) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    wanted = torch.cat([pairs.real, pairs.imag, x[..., turned:]], -1)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda x: rotate(x, cos, sin), (x,))
    apart = torch.cat([x[..., :turned:2], x[..., 1:turned:2], x[..., turned:]], -1)  # neighbours in both halves
    neighbours = rotate(apart, cos, sin)
    wanted = torch.stack(neighbours[..., :turned].chunk(2, -1), -1).flatten(-2)
    cos, sin = (t[:, : turned // 2].repeat_interleave(2, -1) for t in (cos, sin))
    torch.testing.assert_close(rotate(x, cos, sin, True), torch.cat([wanted, x[..., turned:]], -1))
    assert gradcheck(lambda x: rotate(x, cos, sin, True), (x,))
