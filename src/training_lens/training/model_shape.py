"""The sizes of a base with its adapter, counted on its modules without any weights: of a config, of a published model
by its name, or of a config.json alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training_lens.collectors.layer_activations import decoder_layers
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError, ModelLoadingError, TrainingLensError
from training_lens.models.adapter_files import adopt_saved_settings
from training_lens.models.adapters import check_adapter, count_parameters, describe_adapter
from training_lens.models.embedding_rows import token_ids
from training_lens.models.experts import experts_per_token, is_expert_adapter
from training_lens.models.factory import (
    SEQ_LEN_DEFAULT,
    build_skeleton,
    load_tokenizer,
    read_facts,
    resolve_seq_len,
)
from training_lens.models.model_classes import build_model, require_generating
from training_lens.models.omissions import is_linear
from training_lens.training.loop.memory_budget import count_saved_numbers, list_frozen_matrices
from training_lens.utils.formatting import describe_error, did_you_mean
from training_lens.utils.logging import hide_progress_bars
from training_lens.utils.names import expand_home

POSITIONS = 131_072
# What the config.json of Llama 3.2 (1 B, 3 B) and 3.1 says: width, width of the MLP, layers, heads, key-value heads.
LLAMAS = {
    "llama-1b": (2048, 8192, 16, 32, 8),
    "llama-3b": (3072, 8192, 28, 24, 8),
    "llama-8b": (4096, 14_336, 32, 32, 8),
    "llama-70b": (8192, 28_672, 80, 64, 8),
    "llama-405b": (16_384, 53_248, 126, 128, 8),
}
TIED = ("llama-1b", "llama-3b")


@dataclass(frozen=True)
class Weights:
    """`count` frozen tensors of `numbers` each, in `rows` rows (the first dimension, which FSDP2 shards).

    `is_layer`: of a decoder layer; `is_linear`: the weight of a linear layer that is no output head, which 4 bits take.
    """

    rows: int
    numbers: int
    is_layer: bool
    is_linear: bool
    count: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a base with its adapter, in numbers.

    Args:
        seq_len: tokens of the longest example.
        weights: the base's tensors, those of one shape together.
        trainable: of the adapter, and of modules that are trained whole.
        largest_layer: of the base, in the largest decoder layer.
        has_parameter_adapters: whether single parameters, such as experts, are adapted.
        multiplied: weights that each token is multiplied by; of experts those that compute a token.
        attention_width: heads x width of a head, summed over the layers.
        saved: that autograd saves for a token, at most; `saved_checkpointed`: with gradient checkpointing.
    """

    name: str
    adapter: str
    layers: int
    seq_len: int
    weights: tuple[Weights, ...]
    trainable: int
    largest_layer: int
    has_parameter_adapters: bool
    multiplied: float
    attention_width: int
    saved: int
    saved_checkpointed: int

    @property
    def parameters(self) -> int:
        """The base's parameters, tied ones once."""
        return sum(group.numbers * group.count for group in self.weights)

    def count(self, *, in_layers: bool) -> int:
        """The numbers in decoder layers, or in all else: embedding, output head, last norm."""
        return sum(group.numbers * group.count for group in self.weights if group.is_layer == in_layers)


def read_shape(config: TrainingConfig, shape: str | None) -> ModelShape:
    """The sizes of the config's model, or of another `shape`, with the config's adapter. Reads no weights.

    Args:
        shape: a name of `LLAMAS`, a config.json, or its folder; None: the config's model.id.

    Raises:
        TrainingLensError: no such shape or model, or the adapter does not fit it.
    """
    if config.model.resize_embeddings:
        raise ConfigurationError(
            "model.resize_embeddings: plan reads no tokenizer, so it does not count the rows that this adds. Leave it "
            "out, and give peft.modules_to_save=[embed_tokens, lm_head], which is what it trains."
        )
    config = config.replace_keys(peft=adopt_saved_settings(config.peft).model_dump(exclude_unset=True))
    ids: Sequence[int] = ()
    if shape is not None:
        skeleton = build_shape(shape)
        positions = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
        seq_len = config.model.seq_len or min(positions or SEQ_LEN_DEFAULT, SEQ_LEN_DEFAULT)
    else:
        facts = read_facts(config.model)
        if config.data.new_tokens:
            ids = token_ids(load_tokenizer(config.model, new_tokens=config.data.new_tokens), config.data.new_tokens)
        skeleton, seq_len = build_skeleton(config.model, config.data.new_tokens), resolve_seq_len(config.model, facts)
    check_adapter(skeleton, config.peft, ids)
    name = shape or config.model.id
    return measure_skeleton(skeleton, name, describe_adapter(config.peft), seq_len)


def build_shape(shape: str) -> Any:
    """The frozen model of a name in `LLAMAS`, of a config.json or of its folder, on the meta device.

    Raises:
        ConfigurationError: neither a known name nor a file; names the nearest.
        ModelLoadingError: the file describes no causal language model.
    """
    from transformers import LlamaConfig

    path = expand_home(shape)
    if shape not in LLAMAS and not path.exists():
        known = ", ".join(LLAMAS)
        hint = did_you_mean(shape.lower(), LLAMAS)
        raise ConfigurationError(f"--shape {shape}: neither a config.json here nor a known shape ({known}).{hint}")
    try:
        with hide_progress_bars(), torch.device("meta"):
            config = LlamaConfig(**_llama_sizes(shape)) if shape in LLAMAS else _read_config(path)
            if hasattr(config, "quantization_config"):  # quantized modules would have packed sizes
                del config.quantization_config
            require_generating(config)
            built = build_model(config, trust_remote_code=False)
    except TrainingLensError:
        raise
    except Exception as error:  # foreign code reads a foreign file
        raise ModelLoadingError(
            f"--shape: '{shape}' describes no model that can be built: {describe_error(error)} Give the config.json of "
            "a causal language model."
        ) from error
    return built.requires_grad_(False).eval()


def _read_config(path: Path) -> Any:
    """The configuration in a file or folder; code that comes with it is refused, not run."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path), trust_remote_code=False)


def _llama_sizes(name: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, key_value_heads = LLAMAS[name]
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 128_256,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": name in TIED,
    }


def measure_skeleton(skeleton: Any, name: str, adapter: str, seq_len: int) -> ModelShape:
    """The sizes of a base that an adapter was injected into, with or without weights."""
    text, layers = skeleton.config.get_text_config(), decoder_layers(skeleton)
    of_layers = [[p for p in layer.parameters() if not p.requires_grad] for layer in layers]
    in_layers = {id(p) for group in of_layers for p in group}
    head = _find_head(skeleton)
    linear = {id(p) for m in skeleton.modules() if is_linear(m) for p in m.parameters(recurse=False)} - {id(head)}
    frozen = [p for p in skeleton.parameters() if not p.requires_grad]
    groups = Counter(
        (p.shape[0] if p.ndim else 1, p.numel(), id(p) in in_layers, p.ndim == 2 and id(p) in linear) for p in frozen
    )
    matrices = list_frozen_matrices(skeleton)
    is_tied = head is not None and all(p is not head for p in matrices)
    per_token = experts_per_token(skeleton.config)
    heads = getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    return ModelShape(
        name=name,
        adapter=adapter,
        layers=text.num_hidden_layers,
        seq_len=seq_len,
        weights=tuple(Weights(*group, count) for group, count in groups.items()),
        trainable=count_parameters(skeleton).trainable,
        largest_layer=max(sum(p.numel() for p in group) for group in of_layers),
        has_parameter_adapters=any(is_expert_adapter(m) for m in skeleton.modules()),
        multiplied=sum(p.numel() * _active_share(p, per_token) for p in matrices) + (head.numel() if is_tied else 0),
        attention_width=text.num_hidden_layers * heads * width,
        saved=count_saved_numbers(skeleton, seq_len, is_checkpointed=False),
        saved_checkpointed=count_saved_numbers(skeleton, seq_len, is_checkpointed=True),
    )


def _find_head(skeleton: Any) -> Any:
    """The output head's weight, in PEFT's wrapper where it is trained whole; None without one."""
    end = skeleton.get_output_embeddings()
    return getattr(getattr(end, "original_module", end), "weight", None)


def _active_share(matrix: torch.nn.Parameter, per_token: int) -> float:
    """Which part of a matrix multiplies each token: of experts in one parameter those that compute it."""
    return min(1.0, per_token / matrix.shape[0]) if matrix.ndim == 3 else 1.0
