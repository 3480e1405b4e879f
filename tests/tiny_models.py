"""Small models of random weights, of any kind that transformers knows, by one set of sizes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from training_lens import embedded

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2_SIZES = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
# What a kind needs besides, because its default contradicts the sizes or lies beyond the vocabulary.
NEEDS: dict[str, dict[str, Any]] = {
    "Cohere": {"bos_token_id": 1, "eos_token_id": 2},
    "Cohere2": {"bos_token_id": 1, "eos_token_id": 2, "head_dim": 8},
    "Gemma": {"head_dim": 8, "pad_token_id": 0},
    "Gemma2": {"head_dim": 8, "pad_token_id": 0},
    "Gemma3Text": {"head_dim": 8, "pad_token_id": 0},
    "Mixtral": {"num_local_experts": 4},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Phi3": {"pad_token_id": 0},
    "Qwen3": {"head_dim": 8},
}
# Weights so large and a vocabulary so small that greedy answers wander through all of it.
WANDERING = {"vocab_size": 64, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": None}


def tiny_config(kind: str = "Llama", **changes: Any) -> Any:
    """The configuration of a kind ("Llama", "GPT2", "Gemma3Text"); `changes` replace and add to its sizes."""
    sizes = GPT2_SIZES if kind == "GPT2" else SIZES | NEEDS.get(kind, {})
    return getattr(transformers, f"{kind}Config")(**sizes | changes)


def tiny_model(kind: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model, always with the same random weights: frozen, in evaluation mode."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    return model.to(dtype).requires_grad_(False).eval()


def save_tiny_model(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The folder, with such a model and the files of the embedded tokenizer."""
    tiny_model(kind, dtype, **changes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(embedded.PATHS[embedded.MODEL]) / name, folder)
    return folder


TINY_TOKENIZERS = ("characters", "turns", "bytes")
TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def build_tiny_tokenizer(kind: str) -> Any:
    """A tokenizer with a token for each character of common English.

    characters: as of Llama's: a blank is a letter, one more stands before each text, and BOS before that. Characters
        that it has no token for are <unk>, with which it also pads. Without a chat template.
    turns: the same with tokens for the bytes of unknown characters, and with a chat template.
    bytes: as of GPT-2's: a token for each byte, and none that begins or ends a text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if kind == "bytes":
        letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        built = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        built.add_special_tokens(["<|endoftext|>"])
        built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=built)
    marks = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"] if kind == "turns" else []
    tokens = ["<unk>", "<s>", "</s>", *marks, *(f"<0x{i:02X}>" for i in range(256) if kind == "turns")]
    tokens += ["\n", "▁", *(chr(i) for i in range(ord("!"), 127))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=kind == "turns"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    names = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "<|end|>" if marks else "</s>",
        "pad_token": "<unk>",
    }
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = TURNS if marks else None
    return tokenizer
