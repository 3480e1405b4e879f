"""A tokenizer as llama.cpp reads it: tokens with their kinds, merges or scores, and the rule that splits words.

llama.cpp has its own code for each kind of tokenizer, chosen by name. Two kinds are written: byte-level BPE (GPT-2's),
for the splitting rules that are known here, and BPE on blanks with bytes for unknown characters (Llama 2's, from
SentencePiece). Others are refused, since a wrong name means other tokens, silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training_lens.errors import AdapterError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
BLANK = "▁"
# The words that a byte-level tokenizer splits text into, by its expression in tokenizer.json: llama.cpp's name of them.
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {_LETTERS + r"\p{N}{1,3}|" + _TAIL: "llama-bpe", _LETTERS + r"\p{N}|" + _TAIL: "qwen2"}


@dataclass(frozen=True)
class StopTokens:
    """Tokens that end an answer: the first is the tokenizer's own, the second that of a chat's turn."""

    eos: int
    end_of_turn: int | None


def tokenizer_values(tokenizer: Any, vocabulary: int, stops: StopTokens) -> dict[str, Any]:
    """The values of a GGUF file that describe a tokenizer and its chat template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: rows of the model's embedding; those beyond the tokenizer's are unused tokens.

    Raises:
        AdapterError: llama.cpp has no such tokenizer, or its name is not known here.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise AdapterError(f"--to gguf: the tokenizer is a {model['type']}; only BPE is written for llama.cpp here.")
    tokens = _list_tokens(tokenizer, model, vocabulary)
    kinds = [_find_kind(tokenizer, token, i, model.get("unk_token")) for i, token in enumerate(tokens)]
    values: dict[str, Any] = {
        "tokenizer.ggml.tokens": [token or f"[PAD{i}]" for i, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": kinds,
    }
    values |= _bytewise_values(model, rules) if not model.get("byte_fallback") else _blank_values(model, rules, tokens)
    return values | _special_values(tokenizer, stops)


def _list_tokens(tokenizer: Any, model: Mapping[str, Any], vocabulary: int) -> list[str]:
    """Each id's token; '' for an id without one."""
    known = {**model["vocab"], **tokenizer.get_added_vocab()}
    if max(known.values()) >= vocabulary:
        raise AdapterError(
            f"--to gguf: the tokenizer has {max(known.values()) + 1} tokens, and the model {vocabulary} rows for them."
        )
    by_id = {i: token for token, i in known.items()}
    return [by_id.get(i, "") for i in range(vocabulary)]


def _find_kind(tokenizer: Any, token: str, i: int, unknown: str | None) -> int:
    if not token:
        return UNUSED
    if token == unknown:
        return UNKNOWN
    added = tokenizer.added_tokens_decoder.get(i)
    if added is not None:
        return CONTROL if added.special or _looks_special(token) else USER_DEFINED
    return BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _looks_special(token: str) -> bool:
    return token.startswith("<|") and token.endswith("|>")


def _merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges by rank; tokenizer.json has them as pairs, or as texts in its older form."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _bytewise_values(model: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merge_pairs(model)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name_splitting(rules["pre_tokenizer"], rules["normalizer"]),
        "tokenizer.ggml.merges": merges,
    }


def name_splitting(rule: Mapping[str, Any] | None, normalizer: Mapping[str, Any] | None) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text.

    Args:
        rule: `pre_tokenizer` of tokenizer.json; `normalizer` likewise.

    Raises:
        AdapterError: its name is not known here.
    """
    steps: Sequence[Mapping[str, Any]] = (rule or {}).get("pretokenizers", [rule] if rule else [])
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    is_bytewise = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if is_bytewise and kinds == ["ByteLevel"] and last.get("use_regex", True) and not normalizer:
        return "gpt-2"
    if (
        is_bytewise
        and kinds == ["Digits", "ByteLevel"]
        and steps[0]["individual_digits"]
        and last.get("use_regex", True)
    ):
        return "smollm"
    if is_bytewise and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        expression = steps[0]["pattern"].get("Regex", "")
        if expression in SPLITS:
            return SPLITS[expression]
    raise AdapterError(
        f"--to gguf: the tokenizer splits text by a rule that is not known here ({json.dumps(rule)[:200]}), and "
        "llama.cpp goes by its own names for these. Merge the run, and convert the folder with llama.cpp's "
        "convert_hf_to_gguf.py."
    )


def _blank_values(model: Mapping[str, Any], rules: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """llama.cpp joins the pair with the highest score first: here, the lowest rank of a merge that makes the token."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merge_pairs(model)):
        ranks.setdefault("".join(pair), rank)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(ranks))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _has_blank_before(rules),
    }


def _has_blank_before(rules: Mapping[str, Any]) -> bool:
    """Whether a blank is put before a text."""
    normalizer, rule = rules["normalizer"] or {}, rules["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or rule.get("prepend_scheme", "never") != "never"


def _special_values(tokenizer: Any, stops: StopTokens) -> dict[str, Any]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": stops.eos,
        "eot": stops.end_of_turn,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    values: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    bare, whole = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    values["tokenizer.ggml.add_bos_token"] = len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id
    values["tokenizer.ggml.add_eos_token"] = len(whole) > len(bare) and whole[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        values["tokenizer.chat_template"] = tokenizer.chat_template
    return values
