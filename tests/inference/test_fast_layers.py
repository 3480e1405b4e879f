"""What our layers compute is what they stand for, adapters beside the weights as near to the exact sum as PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from training_lens.models.fast.fused_layers import flatten_angles, rotate_projections
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.layer_spec import AttentionSpec
from training_lens.models.fast.native.attention_kernels import ScoreSpec
from training_lens.models.fast.tolerance import relative_error


def adapted_linear(share: float) -> nn.Module:
    """A bfloat16 layer 64 -> 96 with a float32 LoRA, whose branch is so large a share of the base's product."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)})
    layer: nn.Module = get_peft_model(model, LoraConfig(r=8, target_modules=["layer"])).base_model.model["layer"]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(down)
    nn.init.normal_(up)
    base = layer.base_layer.weight.float().norm()
    up.data *= share * base / (layer.scaling["default"] * (up @ down).norm())
    return layer


def exact(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    up, down = (part["default"].weight.double() for part in (layer.lora_B, layer.lora_A))
    weight = layer.base_layer.weight.double() + layer.scaling["default"] * up @ down
    return x.double() @ weight.T


@pytest.mark.parametrize(("share", "together"), [(0.03, 50), (0.3, 2000), (1.0, 50), (10.0, 2000)])
def test_an_adapter_beside_bf16_weights_is_as_exact_as_pefts(share: float, together: int) -> None:
    with torch.no_grad():
        layer = adapted_linear(share)
        x = torch.randn(2000, 64).bfloat16()
        wanted, product = exact(layer, x), FusedLinear([layer], decodes=True)
        found = torch.cat([product(some) for some in x.split(together)])
        assert found.dtype == torch.bfloat16
        assert relative_error(found, wanted) <= 1.001 * relative_error(layer(x), wanted)
        assert (found == layer(x)).float().mean() > 0.995


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_adapters_of_some_of_the_layers_stay_with_theirs(dora: bool) -> None:
    torch.manual_seed(0)
    parts = nn.ModuleDict({"a": nn.Linear(12, 5), "b": nn.Linear(12, 7, bias=False), "c": nn.Linear(12, 5)})
    config = LoraConfig(r=3, target_modules=["b"], init_lora_weights=False, use_dora=dora)
    layers = list(get_peft_model(parts, config).base_model.model.values())
    x = torch.randn(4, 12)
    wanted = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(FusedLinear(layers, decodes=True)(x), wanted)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("rows", [1, 2])
def test_positions_turn_as_in_transformers(rows: int) -> None:
    torch.manual_seed(0)
    spec = AttentionSpec(("qkv_proj",), 3, 1, 8, ScoreSpec(1.0), None, "halves")
    fused = torch.randn(2, 5, 5 * 8)  # (rows, length, heads of queries, keys and values)
    half = torch.randn(rows, 5, 4)
    cos, sin = (torch.cat([t, t], dim=-1) for t in (half.cos(), half.sin()))
    q, k, v = fused.unflatten(-1, (5, 8)).split([3, 1, 1], 2)
    wanted = *apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2), v
    found = rotate_projections(fused.flatten(0, 1), spec, None, *flatten_angles((cos, sin), 2))
    torch.testing.assert_close(found, tuple(part.flatten(0, 1) for part in wanted))


@pytest.mark.parametrize("rows", [0, 1, 64, 65])
def test_few_rows_and_many_are_those_of_the_weights(rows: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, out, dtype=torch.bfloat16) for out in (8, 12)]
    x = torch.randn(rows, 3, 64).bfloat16()
    with torch.no_grad():
        found = FusedLinear(layers, decodes=True)(x)
        wanted = [nn.functional.linear(x.double(), p.weight.double(), p.bias.double()) for p in layers]
    assert found.shape == (rows, 3, 20)
    torch.testing.assert_close(found.double(), torch.cat(wanted, -1), rtol=2**-7, atol=1e-4)
