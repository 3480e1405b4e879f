"""Small models of random weights, of any kind that transformers knows by one set of sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import Session

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


def answer_ids(session: Session, prompts: Any, settings: InferenceSection, **options: Any) -> list[list[int]]:
    """The tokens of many answers; arguments are those of `generate_answers`."""
    return [list(answer.token_ids) for answer in generate_answers(session, prompts, settings, **options)]
