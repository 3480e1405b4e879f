"""A decoder of known parts goes through our layers alone; any other goes through its own modules."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_models import WANDERING, tiny_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from training_lens.inference import decoder
from training_lens.inference.decode_loop import Decoder, SharedPrefix, prefill
from training_lens.inference.decoder import build_decoder
from training_lens.models.fast.tolerance import relative_error

WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {}),
    "granite": (
        "Granite",
        {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 5.0, "attention_multiplier": 0.2},
    ),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {**WINDOWED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", {**WINDOWED, "final_logit_softcapping": 2.0}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": ("Cohere2", WINDOWED),
}
PROMPTS = [list(range(20)), list(range(40, 47)), [3]]


def made(kind: str, more: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    return build_decoder(tiny_model(kind, dtype, **WANDERING | more), False, torch.arange(24)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_decoder_says_in_our_pass_what_its_modules_say(name: str, dtype: torch.dtype) -> None:
    """Padded prompts, so that masks are there."""
    ours = made(*KINDS[name], dtype)
    assert ours.stack
    by_modules = Decoder(ours.model, ours.windows, ours.keeps_last, ours.dtype, ours.device)
    with torch.inference_mode():
        found, _ = prefill(ours, PROMPTS, SharedPrefix())
        wanted, _ = prefill(by_modules, PROMPTS, SharedPrefix())
    assert relative_error(found, wanted) < 1e-6


class LouderLayer(LlamaDecoderLayer):
    """Computes more than its parts, but far less than what bf16 would forgive two kinds of layers."""

    def forward(self, *given: Any, **options: Any) -> Any:
        return super().forward(*given, **options) * 1.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_does_more_than_its_parts_goes_through_its_modules(dtype: torch.dtype) -> None:
    model = tiny_model("Llama", dtype, **WANDERING)
    model.model.layers[0].__class__ = LouderLayer  # of the last layer, the norm behind it would undo it
    assert build_decoder(model, False, torch.arange(24)[None]).stack is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("StableLm", "a last norm or an output layer that decodes by itself"),
        ("GPTNeoX", "attention of another structure"),
    ],
)
def test_why_a_model_goes_through_its_modules_is_logged_once(
    kind: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    decoder.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "training_lens"):
        assert made(kind, {}).stack is made(kind, {}).stack is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"answers come layer by layer from {kind}ForCausalLM: ") and reason in line


def test_who_listens_to_a_layer_hears_it() -> None:
    model = tiny_model(**WANDERING)
    heard: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *_given: heard.append(1))
    decoder = build_decoder(model, False, torch.arange(24)[None])
    heard.clear()
    with torch.inference_mode():
        prefill(decoder, PROMPTS, SharedPrefix())
    assert decoder.stack is None and heard
