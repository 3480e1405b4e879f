"""Tiny real models of the architectures that adapters meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def gpt2() -> Callable[[], Any]:
    """Makes a GPT-2 of two layers: Conv1D layers, tied embeddings."""
    from transformers import AutoModelForCausalLM, GPT2Config

    def make() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()

    return make


@pytest.fixture
def mixtral() -> Callable[[], Any]:
    """Makes a mixture of experts, whose experts are one fused parameter."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    def make() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
        return AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).requires_grad_(False).eval()

    return make
