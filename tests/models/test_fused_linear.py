"""Layers computed together give what PEFT's own modules give, with their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.layer_spec import UnknownLayerError


def adapted(bias: bool = False, rank: int = 3, **config: Any) -> Linear:
    """A linear layer of PEFT's in float64 whose adapter changes what it computes."""
    base = nn.Linear(7, 5, bias=bias).double().requires_grad_(False)
    layer = Linear(base, "default", LoraConfig(init_lora_weights=False, **config), r=rank, lora_alpha=6).double()
    for magnitude in layer.lora_magnitude_vector.parameters():  # fresh, it would give a gain of about 1
        magnitude.data *= torch.linspace(0.5, 2, len(magnitude), dtype=magnitude.dtype)
    return layer


def result(call: Any, layers: list[Linear]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a call gives of a fixed input, and the gradients of that input and of everything that trains."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)  # of the dropout
    y = call(x)
    wanted = {"x": x, **{f"{i}.{n}": p for i, layer in enumerate(layers) for n, p in layer.named_parameters()}}
    wanted = {name: parameter for name, parameter in wanted.items() if parameter.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y).cumsum(-1))
    return y.detach(), dict(zip(wanted, grads, strict=True))


def same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_gives_what_peft_gives(dora: bool, dropout: float, bias: bool) -> None:
    layer = adapted(bias, use_dora=dora, lora_dropout=dropout)
    wanted = result(layer, [layer])
    assert ("0.lora_magnitude_vector.default.weight" in wanted[1]) == dora
    product = FusedLinear([layer])
    same(result(product, [layer]), wanted)
    layer.eval()
    same(result(product, [layer]), result(layer, [layer]))


def test_layers_with_dora_and_without_and_with_no_adapter_are_one_product() -> None:
    layers = [adapted(use_dora=True), adapted(rank=2), nn.Linear(7, 4, bias=False).double().requires_grad_(False)]

    def one_by_one(x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in layers], -1)

    wanted = result(one_by_one, layers)
    same(result(FusedLinear(layers), layers), wanted)


def test_dora_switched_off_is_the_base() -> None:
    layer = adapted(use_dora=True)
    layer.enable_adapters(False)
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(FusedLinear([layer])(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("config", [{"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, {"lora_bias": True}])
def test_other_variants_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnknownLayerError, match="adapters "):
        FusedLinear([adapted(bias=True, **config)])
