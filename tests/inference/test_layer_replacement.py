"""Replaced layers leave a model's scores as they are; a layer that only looks like a known one stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import WANDERING, tiny_model

from training_lens.models.fast.fused_layers import DecodingAttention, DecodingNorm, FusedMLP
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.layer_replacement import replace_layers
from training_lens.models.fast.tolerance import relative_error

LAYERS = 2
KNOWN = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Granite", "Olmo2", "Phi3", "Cohere"]
OTHERS = ["GPTNeoX", "StableLm"]


def count(model: Any, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("kind", KNOWN + OTHERS)
def test_scores_are_what_they_were(kind: str) -> None:
    model, ids = tiny_model(kind, **WANDERING), torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        replace_layers(model, ids)
        assert relative_error(model(input_ids=ids).logits, wanted) < 1e-5
    if kind in KNOWN:
        assert (count(model, DecodingAttention), count(model, FusedMLP)) == (LAYERS, LAYERS) and count(
            model, DecodingNorm
        ) > LAYERS


def test_in_bf16_weights_are_joined_without_a_change_of_the_product() -> None:
    model, ids = tiny_model("Llama", torch.bfloat16, **WANDERING), torch.arange(24)[None]
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    layer = model.model.layers[0]
    with torch.inference_mode():
        wanted = torch.cat([layer.mlp.gate_proj(x), layer.mlp.up_proj(x)], dim=-1)
        replace_layers(model, ids)
        assert isinstance(layer.mlp, FusedMLP) and torch.equal(layer.mlp.gate_up(x), wanted)


def test_a_layer_that_says_something_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(**WANDERING), torch.arange(24)[None]
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    def louder(self: Any, *given: Any, **options: Any) -> Any:
        out, weights = forward(self, *given, **options)
        return (1.01 * out if self is attention else out), weights

    monkeypatch.setattr(type(attention), "forward", louder)
    replace_layers(model, ids)
    assert model.model.layers[1].self_attn is attention and count(model, DecodingAttention) == LAYERS - 1


def test_a_product_that_is_right_for_few_rows_alone_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("Llama", torch.bfloat16, **WANDERING), torch.arange(24)[None]
    right = FusedLinear.apply_to_many_rows
    monkeypatch.setattr(FusedLinear, "apply_to_many_rows", lambda self, x: 2 * right(self, x))
    with torch.inference_mode():
        replace_layers(model, ids)
    assert count(model, DecodingAttention) == count(model, FusedMLP) == 0
