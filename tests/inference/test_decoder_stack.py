"""A model that is a plain decoder goes through our layers alone; any other goes through its own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import random_model

from training_lens.inference.decode_loop import Decoder, SharedPrefix, prefill
from training_lens.inference.decoder import build_decoder
from training_lens.models.fast.tolerance import relative_error

MULTIPLIED = {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}
HARDLY_MULTIPLIED = {"residual_multiplier": 0.99}  # far less than what bf16 would forgive two kinds of layers
PROMPTS = [list(range(20)), list(range(40, 47)), [3]]


def made(kind: str, more: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    return build_decoder(random_model(kind, dtype, **more), False, torch.arange(24)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "Phi3"])
def test_a_plain_decoder_says_in_our_pass_what_its_modules_say(kind: str, dtype: torch.dtype) -> None:
    """Padded prompts, so that masks are there."""
    ours = made(kind, {"sliding_window": 8} if kind == "Mistral" else {}, dtype)
    assert ours.stack
    by_modules = Decoder(ours.model, ours.windows, ours.keeps_last, ours.dtype, ours.device)
    with torch.inference_mode():
        found, _ = prefill(ours, PROMPTS, SharedPrefix())
        wanted, _ = prefill(by_modules, PROMPTS, SharedPrefix())
    assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Granite", MULTIPLIED), ("Granite", HARDLY_MULTIPLIED), ("Gemma", {}), ("Gemma2", {}), ("Cohere", {})],
    ids=str,
)
def test_a_model_that_does_more_than_its_parts_goes_through_its_modules(kind: str, more: dict[str, Any]) -> None:
    assert made(kind, more, torch.bfloat16).stack is None


def test_who_listens_to_a_layer_hears_it() -> None:
    model = random_model("Llama")
    heard: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *_given: heard.append(1))
    decoder = build_decoder(model, False, torch.arange(24)[None])
    heard.clear()
    with torch.inference_mode():
        prefill(decoder, PROMPTS, SharedPrefix())
    assert decoder.stack is None and heard
