"""How llama.cpp stores the architectures that it shares with transformers: names, order of rows, settings.

One entry of the table is one `model_type`. What llama.cpp computes differently from transformers is refused by
`explain_unsupported`, rather than written and wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training_lens.errors import AdapterError

Settings = dict[str, Any]  # keys without the architecture's name before them


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp, for one `model_type` of transformers."""

    name: str  # of `gguf.MODEL_ARCH`, in lower case
    settings: Callable[[Any], Settings]  # from the text model's config, besides `common_settings`
    row_order: Callable[[str, Any, int], Tensor | None] = lambda _name, _config, _rows: None
    norm_shift: float = 0.0  # added to the weights of norms
    has_head: bool = True  # it reads an output head of its own where the embedding is not tied to it
    explain_unsupported: Callable[[Any], str] = lambda _config: ""  # why this config cannot be written; '' if it can


def find_architecture(config: Any) -> GgufArchitecture:
    """The architecture for a model's config.

    Raises:
        AdapterError: llama.cpp has none, or computes this config otherwise.
    """
    text = config.get_text_config()
    found = ARCHITECTURES.get(text.model_type)
    if found is None:
        raise AdapterError(
            f"--to gguf: models of type '{text.model_type}' cannot be written for llama.cpp here; these can: "
            f"{', '.join(sorted(ARCHITECTURES))}. --to plain and merge write them for other programs."
        )
    if reason := found.explain_unsupported(text) or _explain_rope(text):
        raise AdapterError(f"--to gguf: llama.cpp computes this {text.model_type} differently: {reason}.")
    return found


def head_width(config: Any) -> int:
    """Numbers of a query of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def common_settings(config: Any) -> Settings:
    """The settings that nearly every architecture has."""
    heads = config.num_attention_heads
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    values: Settings = {
        "block_count": config.num_hidden_layers,
        "context_length": _context_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": width,
        "vocab_size": config.vocab_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
    }
    for key, names in EPSILONS.items():
        if found := [getattr(config, name) for name in names if getattr(config, name, None) is not None]:
            values[key] = float(found[0])
    return values | _rope_settings(config)


EPSILONS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon"),
}


def rope_parameters(config: Any) -> dict[str, Any]:
    """The parameters of the rotary embedding of layers that attend to everything; empty where there is none."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))


def _rope_settings(config: Any) -> Settings:
    rope = rope_parameters(config)
    if not rope:
        return {}
    width = int(head_width(config) * rope.get("partial_rotary_factor", 1.0))
    values: Settings = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": width}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values["rope.scaling.original_context_length"] = int(original)
        named = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        values |= {f"rope.scaling.{there}": float(rope[here]) for here, there in named.items() if rope.get(here)}
    return values


def _explain_rope(config: Any) -> str:
    kind = rope_parameters(config).get("rope_type", "default")
    return "" if kind in ("default", "linear", "yarn", "llama3") else f"its rotary embedding is scaled by '{kind}'"


def rope_factors(config: Any) -> Tensor | None:
    """llama.cpp's `rope_freqs` (head_dim / 2,): what llama3's scaling divides each frequency by; None of others."""
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = head_width(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # over the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scaled wholly, 1: not at all
    divided_by: Tensor = 1 / ((1 - share) / factor + share)
    return divided_by.float()


def _context_length(config: Any) -> int:
    """Positions; no more than a sliding window that llama.cpp's own architecture does not know."""
    positions = int(getattr(config, "max_position_embeddings", None) or 2048)
    window = getattr(config, "sliding_window", None)
    if window and (config.model_type in ("mistral", "phi3") or getattr(config, "use_sliding_window", False)):
        return min(positions, int(window))
    return positions


def _order_rotary_rows(name: str, config: Any, rows: int) -> Tensor | None:
    """Rows of queries and keys: transformers pairs number i with i + d/2, llama.cpp's Llama with its neighbour."""
    if not name.endswith(("q_proj", "k_proj")):
        return None
    heads = rows // head_width(config)
    order: Tensor = torch.arange(rows).view(heads, 2, -1).swapaxes(1, 2).flatten()
    return order


def _order_grouped_qkv(name: str, config: Any, rows: int) -> Tensor | None:
    """GPT-NeoX's rows (heads, 3, d) as all queries, then keys, then values."""
    if not name.endswith("query_key_value"):
        return None
    order: Tensor = torch.arange(rows).view(config.num_attention_heads, 3, -1).swapaxes(0, 1).flatten()
    return order


def _order_falcon_qkv(name: str, config: Any, rows: int) -> Tensor | None:
    """Falcon's rows (key heads, queries of it + 2, d) as all queries, then keys, then values."""
    if not name.endswith("query_key_value"):
        return None
    groups = torch.arange(rows).view(_falcon_key_heads(config), -1, head_width(config))
    return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])


def _falcon_key_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _falcon_settings(config: Any) -> Settings:
    return {"attention.head_count_kv": _falcon_key_heads(config), "tensor_data_layout": "jploski"}


def _gemma2_settings(config: Any) -> Settings:
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _explain_gemma(config: Any) -> str:
    pattern = 2 if config.model_type == "gemma2" else 6  # which llama.cpp assumes
    usual = [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(len(config.layer_types))
    ]
    if config.layer_types != usual:
        return f"its full-attention layers are not every {pattern}th one"
    if config.query_pre_attn_scalar != head_width(config):
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and not head_dim, {head_width(config)}"
    return ""


def _gemma3_settings(config: Any) -> Settings:
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    return {"attention.sliding_window": config.sliding_window, "rope.freq_base_swa": float(local)}


def _granite_settings(config: Any) -> Settings:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _neox_settings(config: Any) -> Settings:
    return {
        "use_parallel_residual": bool(config.use_parallel_residual),
        "attention.head_count_kv": config.num_attention_heads,
    }


def _phi3_settings(config: Any) -> Settings:
    return {"rope.scaling.original_context_length": config.original_max_position_embeddings}


def _expert_settings(config: Any) -> Settings:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return {
        "expert_count": count,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": width,
    }


def _gpt_oss_settings(config: Any) -> Settings:
    return _expert_settings(config) | {"attention.sliding_window": config.sliding_window}


def _explain_window(config: Any) -> str:
    return (
        "its layers differ in their sliding windows"
        if len(set(getattr(config, "layer_types", None) or [0])) > 1
        else ""
    )


def _explain_router(config: Any) -> str:
    return _explain_window(config) or ("" if config.norm_topk_prob else "its router's weights do not add up to 1")


def _explain_falcon(config: Any) -> str:
    if config.alibi:
        return "it has ALiBi positions"
    return "" if config.parallel_attn or config.new_decoder_architecture else "its attention and MLP are not parallel"


def _no_settings(_config: Any) -> Settings:
    return {}


ARCHITECTURES = {
    "llama": GgufArchitecture("llama", _no_settings, _order_rotary_rows),
    "mistral": GgufArchitecture("llama", _no_settings, _order_rotary_rows),
    "mixtral": GgufArchitecture("llama", _expert_settings, _order_rotary_rows),
    "granite": GgufArchitecture("granite", _granite_settings, _order_rotary_rows),
    "qwen2": GgufArchitecture("qwen2", _no_settings, explain_unsupported=_explain_window),
    "qwen3": GgufArchitecture("qwen3", _no_settings, explain_unsupported=_explain_window),
    "qwen3_moe": GgufArchitecture("qwen3moe", _expert_settings, explain_unsupported=_explain_router),
    "phi3": GgufArchitecture("phi3", _phi3_settings),
    "gemma2": GgufArchitecture(
        "gemma2", _gemma2_settings, norm_shift=1, has_head=False, explain_unsupported=_explain_gemma
    ),
    "gemma3_text": GgufArchitecture("gemma3", _gemma3_settings, norm_shift=1, explain_unsupported=_explain_gemma),
    "gpt2": GgufArchitecture("gpt2", _no_settings),
    "gpt_neox": GgufArchitecture("gptneox", _neox_settings, _order_grouped_qkv),
    "falcon": GgufArchitecture("falcon", _falcon_settings, _order_falcon_qkv, explain_unsupported=_explain_falcon),
    "olmo2": GgufArchitecture("olmo2", _no_settings),
    "gpt_oss": GgufArchitecture("gpt-oss", _gpt_oss_settings),
}
