"""Small models of random weights, in the form that transformers 4.57 writes: run by its Python.

python bases.py TOKENIZER OUT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SHARED: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 5,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 16.0, 30.0]}
GPT2 = {"vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3_rope": ("llama", SHARED | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama_yarn": ("llama", SHARED | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "phi3_longrope": ("phi3", SHARED | {"rope_scaling": LONG, "original_max_position_embeddings": 32}),
    "qwen2_tied": ("qwen2", SHARED | {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "gemma2": ("gemma2", SHARED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "gemma3_text": ("gemma3_text", SHARED | {"head_dim": 16, "sliding_window": 16, "rope_local_base_freq": 1e4}),
    "mixtral": ("mixtral", SHARED | EXPERTS),
    "qwen3_moe": ("qwen3_moe", SHARED | EXPERTS | {"head_dim": 16}),
    "gpt_oss": ("gpt_oss", SHARED | EXPERTS | {"head_dim": 16, "sliding_window": 16}),
    "gpt2": ("gpt2", GPT2 | {"eos_token_id": 5, "pad_token_id": 1}),
}


def main(tokenizer: Path, out: Path) -> None:
    """Build and save every model, with the tokenizer's rules and a config that older versions read."""
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    for name, (kind, sizes) in MODELS.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).save_pretrained(out / name)
        shutil.copy(tokenizer / "tokenizer.json", out / name)
        config = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
        (out / name / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
