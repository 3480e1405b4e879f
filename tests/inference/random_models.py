"""Small models of random weights, of any kind that transformers knows by one set of sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": None,
}


def random_model(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Frozen, in evaluation; `more` adds to the sizes."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
