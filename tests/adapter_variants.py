"""Adapters of every kind of scale, with random weights, as after training."""

from __future__ import annotations

from typing import Any

import torch

from training_lens.config.schema import PeftSection
from training_lens.models.adapters import attach

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 5, "lora_alpha": 7, "variant": "rslora"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 1},
    },
    "rslora, patterns": {
        "r": 4,
        "lora_alpha": 8,
        "variant": "rslora",
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"k_proj": 11},
    },
    "pissa": {"r": 4, "lora_alpha": 4, "init": "pissa"},
    "pissa, rslora": {"r": 3, "lora_alpha": 5, "init": "pissa", "variant": "rslora"},
    "embedding": {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"]},
}


def adapt(model: Any, **peft: Any) -> Any:
    """The model with an adapter whose A and B are all random, as none is after a start."""
    adapted = attach(model, PeftSection.model_validate(peft))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()
