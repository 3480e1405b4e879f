"""The specs of a model's layers say what its config says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from training_lens.models.fast.layer_spec import AttentionSpec, MLPSpec, NormSpec
from training_lens.models.fast.native.attention_kernels import ScoreSpec
from training_lens.models.fast.recognition import RecognizedLayers, recognize_layers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None,
}  # fmt: skip
APART, FUSED = ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)
GATE_UP = ("gate_proj", "up_proj")
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 25, "rms_norm_eps": 1e-3}
KINDS: dict[str, tuple[dict[str, Any], NormSpec, MLPSpec, list[AttentionSpec]]] = {
    "Llama": (
        {"rms_norm_eps": 1e-4}, NormSpec("rms", 1e-4), MLPSpec(GATE_UP, "silu"),
        [AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.25), None, "halves")] * 2,
    ),
    "Phi3": (
        {"rms_norm_eps": 1e-4, "sliding_window": 7}, NormSpec("rms", 1e-4), MLPSpec(("gate_up_proj",), "silu"),
        [AttentionSpec(FUSED, 4, 2, 16, ScoreSpec(0.25, 7), None, "halves")] * 2,
    ),
    "Qwen3": (
        {"rms_norm_eps": 1e-4, "hidden_act": "gelu"}, NormSpec("rms", 1e-4), MLPSpec(GATE_UP, "gelu"),
        [AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.25), "head", "halves")] * 2,
    ),
    "Gemma2": (
        {**GEMMA, "attn_logit_softcapping": 3.0}, NormSpec("rms", 1e-3, True), MLPSpec(GATE_UP, "gelu_tanh"),
        [AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.2, window, 3.0), None, "halves") for window in (5, None)],
    ),
    "Gemma3Text": (
        GEMMA, NormSpec("rms", 1e-3, True), MLPSpec(GATE_UP, "gelu_tanh"),
        [AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.2, window), "head", "halves") for window in (5, None)],
    ),
    "Olmo2": (
        {"rms_norm_eps": 1e-4, "hidden_act": "relu"}, NormSpec("rms", 1e-4), MLPSpec(GATE_UP, None),
        [AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.25), "width", "halves")] * 2,
    ),
    "Cohere": (
        {"layer_norm_eps": 1e-3}, NormSpec("layer", 1e-3), MLPSpec(GATE_UP, "silu"),
        [AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.25), None, "interleaved")] * 2,
    ),
    "Cohere2": (
        {**WINDOW, "layer_norm_eps": 1e-3}, NormSpec("layer", 1e-3), MLPSpec(GATE_UP, "silu"),
        [AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.25, 5), None, "interleaved"),
         AttentionSpec(APART, 4, 2, 16, ScoreSpec(0.25), None, None)],
    ),
}  # fmt: skip


def build(kind: str, more: dict[str, Any]) -> Any:
    """With random weights, norms among them, so that 1 + w and w differ."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES | more))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False).eval()


def specs(found: RecognizedLayers, kind: type) -> list[Any]:
    return [spec for spec in found.specs.values() if isinstance(spec, kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_specs_are_those_of_the_config(kind: str) -> None:
    more, norm, mlp, attentions = KINDS[kind]
    found = recognize_layers(build(kind, more))
    assert not found.refusals and found.attention_refusal == ""
    assert specs(found, AttentionSpec) == list(found.attentions.values()) == attentions
    assert specs(found, MLPSpec) == [mlp] * 2 and set(specs(found, NormSpec)) == {norm}


def double(_module: Any, _given: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: setattr(a, "attention_dropout", 0.1), "attention with dropout"),
        (lambda a: setattr(a, "extra", nn.Linear(2, 2)), "attention with more than projections and norms"),
        (lambda a: setattr(a, "drops", nn.Dropout(0.1)), "attention with more than projections and norms"),
        (lambda a: setattr(a, "forward", a.forward), "LlamaAttention has a forward of its own"),
        (lambda a: a.q_proj.register_forward_hook(double), "queries and keys are formed otherwise"),
        (lambda a: a.v_proj.register_forward_hook(double), "queries and keys are formed otherwise"),
    ],
)  # fmt: skip
def test_an_attention_that_is_another_is_refused_with_its_reason(change: Any, reason: str) -> None:
    model = build("Llama", {})
    change(model.model.layers[1].self_attn)
    found = recognize_layers(model)
    assert reason in found.attention_refusal and found.attentions == {}
    assert len(specs(found, MLPSpec)) == 2 and len(specs(found, NormSpec)) == 5


def test_dropout_of_0_and_training_are_left_as_they_are() -> None:
    model = build("Llama", {}).train()
    model.model.layers[0].self_attn.drops = nn.Dropout(0.0)
    assert len(recognize_layers(model).attentions) == 2 and model.training
