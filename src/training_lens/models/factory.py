"""Tokenizer, configuration and weights of a base model, from a local folder or a hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training_lens import embedded
from training_lens.config.schema import ModelSection
from training_lens.errors import ConfigurationError, ModelLoadingError, OutOfMemoryError, TrainingLensError
from training_lens.models.embedding_rows import add_token_rows, add_tokens, required_rows, resize_embeddings
from training_lens.models.location import WEIGHTS, locate_model
from training_lens.models.model_classes import build_model, load_class, require_generating
from training_lens.models.quantization import keep_trainable, loading_options
from training_lens.models.rotary import separate_examples
from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import read_json
from training_lens.utils.formatting import describe_error
from training_lens.utils.hub_access import require_hub
from training_lens.utils.integrity import require_intact
from training_lens.utils.logging import hide_progress_bars
from training_lens.utils.names import expand_home
from training_lens.utils.resource_errors import is_out_of_memory

SEQ_LEN_DEFAULT = 2048


@dataclass(frozen=True)
class ModelFacts:
    """Sizes from a model's configuration, read without its weights."""

    width: int
    layers: int
    positions: int | None
    vocabulary: int


@contextmanager
def explain_failures(what: str, model: ModelSection) -> Iterator[None]:
    """In the block, foreign code reads foreign files; any error it raises is explained with a way to fix it."""
    try:
        with hide_progress_bars():
            yield
    except TrainingLensError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"model.id: not enough memory for the {what} of '{model.id}': {describe_error(error)} Free some, give "
                "a smaller model, or load fewer bits (model.dtype=bf16, model.quantization=4bit)."
            ) from error
        raise ModelLoadingError(f"model.id: {_describe_failure(what, model.id, error)}") from error


def _describe_failure(what: str, model_id: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{what} of '{model_id}' needs a package: {describe_error(error)}"
    if "trust_remote_code" in str(error):
        return f"'{model_id}' carries its own code. Read it, then set model.trust_remote_code=true."
    why = describe_error(error)
    if expand_home(embedded.resolve_name(model_id)).exists():
        return f"{what} of '{model_id}' cannot be loaded: {why} Download the model again, or give another."
    return (
        f"'{model_id}' is not a local folder, and its {what} cannot be loaded from the hub: {why} Give "
        "a local folder, or check the id, the connection and (for gated models) that you are logged in."
    )


def _hub_options(model: ModelSection) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def read_model_config(model: ModelSection) -> Any:
    """The model's configuration, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(locate_model(model), **_hub_options(model))


def read_facts(model: ModelSection) -> ModelFacts:
    """The model's width, positions and vocabulary.

    Raises:
        ModelLoadingError: not found, or not a language model.
    """
    from huggingface_hub import try_to_load_from_cache

    path = locate_model(model)
    if not Path(path).exists() and not isinstance(try_to_load_from_cache(path, "config.json"), str):
        require_hub(f"model.id: '{path}'", ModelLoadingError)  # at once, not after the library's retries

    with explain_failures("configuration", model):
        config = read_model_config(model)
        require_generating(config)
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        names = ("hidden_size", "num_hidden_layers", "vocab_size")
        sizes = {name: getattr(text, name, None) for name in names} | {"max_position_embeddings": positions or 1}
        wrong = [f"{name} {value!r}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]
        if wrong:
            raise ModelLoadingError(
                f"model.id: '{model.id}' is not a language model: its config.json has {', '.join(wrong)}, expected "
                "counts. Give a causal language model."
            )
        return ModelFacts(text.hidden_size, text.num_hidden_layers, positions, text.vocab_size)


def resolve_seq_len(model: ModelSection, facts: ModelFacts) -> int:
    """The longest example in tokens: as configured, otherwise the model's positions, at most 2048.

    Raises:
        ConfigurationError: more than the model has positions.
    """
    if model.seq_len is None:
        return min(facts.positions or SEQ_LEN_DEFAULT, SEQ_LEN_DEFAULT)
    if facts.positions and model.seq_len > facts.positions:
        raise ConfigurationError(
            f"model.seq_len: given {model.seq_len}, but '{model.id}' has {facts.positions} positions; "
            f"give at most {facts.positions}, or null."
        )
    return model.seq_len


def load_tokenizer(model: ModelSection, path: str | None = None, new_tokens: Sequence[str] = ()) -> Any:
    """The tokenizer of the base model with `new_tokens` added; or of the folder `path`, which has them.

    The files of `path` are checked against the run's record.

    Raises:
        ModelLoadingError: it is broken; ConfigurationError: it cannot take one of the tokens.
    """
    from transformers import AutoTokenizer

    source = path or locate_model(model)
    if path:
        require_intact(Path(path))

    with explain_failures(f"tokenizer in {path}" if path else "tokenizer", model):
        tokenizer = AutoTokenizer.from_pretrained(source, **_hub_options(model))
        tokenizer("a word")  # errors in its files may show only in its first use
    add_tokens(tokenizer, new_tokens if path is None else (), model.id)
    return tokenizer


def load_model(model: ModelSection, device: torch.device, precision: Precision, new_tokens: Sequence[str] = ()) -> Any:
    """The base model on `device` with frozen weights, quantized if configured, in eval mode.

    Args:
        new_tokens: that get rows, see `embedding_rows.add_token_rows`.

    Raises:
        ModelLoadingError: files are broken or missing, tensors are missing or of another shape.
        OutOfMemoryError: it does not fit.
        ConfigurationError: quantization without its package.
    """
    quantized = loading_options(model, precision)
    loaded = _load_with_weights(model, device_map={"": device}, **_class_options(model, precision), **quantized)
    return separate_examples(keep_trainable(_add_rows(loaded, model, new_tokens))).requires_grad_(False).eval()


def _load_with_weights(model: ModelSection, **options: Any) -> Any:
    """The model with every tensor from its files, none initialized at random."""
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with explain_failures("weights", model):
        kind = load_class(read_model_config(model))
        loaded, info = kind.from_pretrained(locate_model(model), **options, **_hub_options(model))
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadingError(
            f"model.id: the weights of '{model.id}' lack {len(missing)} of the model's tensors ({missing[0]}, ...), "
            "which would be random. The download is incomplete, or its config.json belongs to another model."
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise ModelLoadingError(
            f"model.id: {len(mismatched)} tensors of '{model.id}' have another shape than its config.json says: {name} "
            f"has {tuple(found)}, expected {tuple(wanted)}. Its config.json belongs to another model."
        )
    return loaded


def build_skeleton(model: ModelSection, new_tokens: Sequence[str] = ()) -> Any:
    """The base model without weights, on the meta device: every module with its sizes, for checks that need no memory.

    Raises:
        ModelLoadingError: the configuration is not that of a causal language model.
    """
    with explain_failures("architecture", model):
        config = read_model_config(model)
        if hasattr(config, "quantization_config"):  # quantized modules would have packed sizes
            del config.quantization_config
        with torch.device("meta"):
            built = _add_rows(build_model(config, model.trust_remote_code), model, new_tokens)
    return built.requires_grad_(False).eval()


def load_thinned(
    model: ModelSection, layers: int, device: torch.device, precision: Precision, new_tokens: Sequence[str] = ()
) -> Any:
    """A model like the base with only `layers` layers and random weights, for measurements.

    Raises:
        ModelLoadingError: its configuration does not say how many layers it has.
    """
    with explain_failures("architecture", model):
        config = read_model_config(model)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        with torch.device(device):
            built = build_model(config, model.trust_remote_code, **_class_options(model, precision))
            built = _add_rows(built, model, new_tokens)
    return built.requires_grad_(False).eval()


def check_vocabulary(required: int, rows: int, model_id: str, resize: bool) -> None:
    """Refuse a tokenizer that requires more than the embedding's `rows`, unless `resize` is set.

    Args:
        required: see `embedding_rows.required_rows`; `resize` is model.resize_embeddings.

    Raises:
        ModelLoadingError: names both sizes.
    """
    if required > rows and not resize:
        raise ModelLoadingError(
            f"model.id: the tokenizer of '{model_id}' has ids up to {required - 1}, its embedding {rows} rows. If "
            f"tokens were added to it, model.resize_embeddings=true adds and trains the {required - rows} missing "
            "rows; otherwise tokenizer and weights belong to different models."
        )


def _add_rows(loaded: Any, model: ModelSection, new_tokens: Sequence[str]) -> Any:
    """The model, with a row for each token of its tokenizer if model.resize_embeddings is set, and for new tokens."""
    if not model.resize_embeddings and not new_tokens:
        return loaded
    tokenizer = load_tokenizer(model)
    if model.resize_embeddings:
        resize_embeddings(loaded, required_rows(tokenizer))
    return add_token_rows(loaded, add_tokens(tokenizer, new_tokens, model.id), model.id)


def _class_options(model: ModelSection, precision: Precision) -> dict[str, Any]:
    """The dtype and attention of the model's class.

    Without an attention transformers chooses sdpa, or eager where sdpa cannot compute the model (Gemma 2's soft caps).
    """
    attention = None if model.attention == "auto" else model.attention
    return {"dtype": DTYPES[precision if model.dtype == "auto" else model.dtype], "attn_implementation": attention}


def check_weights(model: ModelSection) -> None:
    """Refuse a local model whose weights `load_model` would refuse. Reads only the headers of its files.

    Names and shapes are checked by loading onto the meta device, which renames and ties tensors as real loading does.
    Files that are already quantized are left to `load_model`.

    Raises:
        ModelLoadingError: a file is truncated or missing, or tensors are missing or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(locate_model(model))
    if not folder.is_dir():
        return
    for name in weight_files(folder):
        try:
            safe_open(folder / name, "pt")  # reads its header
        except (OSError, SafetensorError) as error:
            raise ModelLoadingError(
                f"model.id: {folder / name} is broken or missing ({error}). Download the model again, whole."
            ) from error
    if "quantization_config" not in read_json(folder / "config.json"):
        _load_with_weights(model, device_map="meta")


def weight_files(folder: Path) -> list[str]:
    """The names of a local model's safetensors files. As in transformers, a single file has priority over an index."""
    single, index = WEIGHTS
    if (folder / single).is_file():
        return [single]
    try:
        content = read_json(folder / index)
    except ValueError as error:
        raise ModelLoadingError(
            f"model.id: {folder / index} is no valid JSON ({error}). Download the model again, whole."
        ) from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ModelLoadingError(
            f"model.id: {folder / index} has no weight_map from tensors to files. Download the model again, whole."
        )
    return sorted(set(files.values()))


def checkpoint_gradients(model: Any) -> None:
    """Keep only the input of each layer, and recompute the layer in the backward pass (arXiv 1604.06174).

    Dropout draws the same numbers again, so losses and gradients do not change.

    Raises:
        ConfigurationError: the model's code does not support it.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigurationError(f"training.gradient_checkpointing: {error} Set it to false.") from error
