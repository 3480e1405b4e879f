"""Small models of random weights, in the form that the transformers writes which runs this.

    python bases.py TOKENIZER OUT [NAME ...]

`make compat` runs it under transformers 4.57; kinds that this does not know are left out, and named.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

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
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPS = {"n_group": 1, "topk_group": 1}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
SPARSE_FROM_SECOND = {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
FOUR = {"num_hidden_layers": 4, "head_dim": 16}
TEXT = SHARED | {"head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TILES = {"image_size": 28, "patch_size": 14}
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [],
}  # fmt: skip
LLAMA4_VISION = {**VISION, **TILES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
LLAMA4_TEXT = {**TEXT, **EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "attention_chunk_size": 16}
GEMMA_TEXT = {**TEXT, "num_hidden_layers": 6, "sliding_window": 16, "query_pre_attn_scalar": 16}
GEMMA4_TEXT = {
    **TEXT, "num_hidden_layers": 6, "sliding_window": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 1024, "global_head_dim": 16, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
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
    # PEFT renames and fuses the weights of adapters on these, as transformers 5 does with their own.
    "deepseek_v2": ("deepseek_v2", SHARED | ROUTED | LATENT | GROUPS | {"first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", SHARED | ROUTED | LATENT | GROUPS | {"first_k_dense_replace": 1}),
    "glm4_moe": ("glm4_moe", TEXT | ROUTED | GROUPS | {"first_k_dense_replace": 1}),
    "glm4_moe_lite": ("glm4_moe_lite", SHARED | ROUTED | LATENT | GROUPS | SPARSE_FROM_SECOND),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        SHARED | {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1,
                  "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    "longcat_flash": (
        "longcat_flash",
        SHARED | LATENT | {"num_layers": 2, "ffn_hidden_size": 128, "moe_topk": 2, "n_routed_experts": 4,
                           "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    ),
    "afmoe": (
        "afmoe",
        TEXT | EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 16, "num_hidden_layers": 4,
                          "global_attn_every_n_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "solar_open": ("solar_open", TEXT | ROUTED | GROUPS),
    "qwen3_next": (
        "qwen3_next", SHARED | EXPERTS | DELTA | FOUR | {"shared_expert_intermediate_size": 32}
    ),
    "dots1": ("dots1", TEXT | ROUTED | GROUPS | {"first_k_dense_replace": 1, "sliding_window": 16}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", TEXT | {"num_experts": 4, "moe_topk": 2}),
    "minimax": (
        "minimax", TEXT | EXPERTS | {"block_size": 16, "layer_types": ["full_attention", "linear_attention"]}
    ),
    "minimax_m2": ("minimax_m2", TEXT | EXPERTS | {"intermediate_size": 32, "rotary_dim": 8}),
    "flex_olmo": ("flex_olmo", SHARED | EXPERTS),
    "exaone_moe": (
        "exaone_moe",
        TEXT | EXPERTS | GROUPS | {"num_shared_experts": 1, "sliding_window": 16, **SPARSE_FROM_SECOND,
                                   "layer_types": ["sliding_attention", "full_attention"]},
    ),
    # A language model with a vision tower; text alone is trained.
    "mm_gemma3": ("gemma3", {"text_config": GEMMA_TEXT, "vision_config": VISION | TILES, "mm_tokens_per_image": 4}),
    "mm_gemma4": ("gemma4", {"text_config": GEMMA4_TEXT, "vision_config": VISION, "audio_config": None}),
    "mm_llama4": ("llama4", {"text_config": LLAMA4_TEXT, "vision_config": LLAMA4_VISION}),
    "mm_mistral3": (
        "mistral3", {"text_config": TEXT | {"model_type": "mistral"},
                     "vision_config": VISION | TILES | {"model_type": "pixtral", "head_dim": 16}},
    ),
    "mm_qwen3_5": ("qwen3_5", {"text_config": SHARED | FOUR | DELTA, "vision_config": QWEN_VISION}),
}  # fmt: skip


def main(tokenizer: Path, out: Path, names: list[str]) -> None:
    """Build and save the models, with the tokenizer's rules and a config that older versions read."""
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    for name in names or MODELS:
        kind, sizes = MODELS[name]
        if kind not in CONFIG_MAPPING:
            print(f"{name}: this transformers has no '{kind}'", file=sys.stderr)
            continue
        build_model(CONFIG_MAPPING[kind](**sizes)).save_pretrained(out / name)
        shutil.copy(tokenizer / "tokenizer.json", out / name)
        config = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
        (out / name / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@torch.no_grad()
def build_model(config: Any) -> Any:
    """A model of random weights, whose norms and biases differ, so that a lost one shows."""
    torch.manual_seed(1)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("norm" in name or name.endswith("bias")):
            parameter += 0.1 * torch.randn_like(parameter)
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
