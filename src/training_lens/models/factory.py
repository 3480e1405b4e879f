"""Tokenizer, configuration and weights of a base model, from a local folder or a hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training_lens import embedded
from training_lens.config.schema import ModelSection
from training_lens.errors import ConfigurationError, ModelLoadingError, OutOfMemoryError, TrainingLensError
from training_lens.models.classes import build_model, load_class
from training_lens.models.embeddings import required_rows, resize_embeddings
from training_lens.models.location import WEIGHTS, locate
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
    """What a model's configuration says, read without its weights."""

    path: str
    width: int
    layers: int
    positions: int | None
    vocabulary: int


def _load(what: str, model: ModelSection, load: Any) -> Any:
    """Call `load`, foreign code on foreign files: whatever it raises, say what was asked for and what to do."""
    try:
        with hide_progress_bars():
            return load()
    except TrainingLensError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"model.id: not enough memory for the {what} of '{model.id}': {describe_error(error)} Free some, give "
                "a smaller model, or load fewer bits (model.dtype=bf16, model.quantization=4bit)."
            ) from error
        raise ModelLoadingError(f"model.id: {_failure(what, model.id, error)}") from error


def _failure(what: str, model_id: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{what} of '{model_id}' needs a package: {describe_error(error)}"
    if "trust_remote_code" in str(error):
        return f"'{model_id}' carries its own code. Read it, then set model.trust_remote_code=true."
    if expand_home(embedded.resolve_name(model_id)).exists():
        why = describe_error(error)
        return f"{what} of '{model_id}' cannot be loaded: {why} Download the model again, or give another."
    return (
        f"'{model_id}' is no local folder, and its {what} cannot be had from the hub: {describe_error(error)} Give a "
        "local folder, or check the id, the connection and (for gated models) that you are logged in."
    )


def _hub_options(model: ModelSection) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def read_facts(model: ModelSection) -> ModelFacts:
    """The model's width, positions and vocabulary.

    Raises:
        ModelLoadingError: not found, or no language model.
    """
    from transformers import AutoConfig

    path = locate(model)
    _require_hub(path)

    def read() -> ModelFacts:
        config = AutoConfig.from_pretrained(path, **_hub_options(model))
        load_class(config)  # refuses what is no decoder-only language model
        text = config.get_text_config()
        sizes = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
        positions = getattr(text, "max_position_embeddings", None)
        _check_sizes(sizes | ({"max_position_embeddings": positions} if positions else {}), model.id)
        return ModelFacts(path, text.hidden_size, text.num_hidden_layers, positions, text.vocab_size)

    facts: ModelFacts = _load("configuration", model, read)
    return facts


def _check_sizes(sizes: dict[str, Any], model_id: str) -> None:
    wrong = [f"{name} {value!r}" for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise ModelLoadingError(
            f"model.id: '{model_id}' is no language model: its config.json has {', '.join(wrong)}, expected counts. "
            "Give a causal language model."
        )


def _require_hub(path: str) -> None:
    """Where `path` is a hub id that is not in the local cache, make sure at once that the hub answers."""
    from huggingface_hub import try_to_load_from_cache

    if not Path(path).exists() and not isinstance(try_to_load_from_cache(path, "config.json"), str):
        require_hub(f"model.id: '{path}'", ModelLoadingError)


def resolve_seq_len(model: ModelSection, facts: ModelFacts) -> int:
    """The longest example in tokens: as asked, else the model's positions, at most 2048.

    Raises:
        ConfigurationError: more than the model has positions for.
    """
    if model.seq_len is None:
        return min(facts.positions or SEQ_LEN_DEFAULT, SEQ_LEN_DEFAULT)
    if facts.positions and model.seq_len > facts.positions:
        raise ConfigurationError(
            f"model.seq_len: given {model.seq_len}, but '{model.id}' has {facts.positions} positions; "
            f"give at most {facts.positions}, or null."
        )
    return model.seq_len


def load_tokenizer(model: ModelSection, path: str | None = None) -> Any:
    """The tokenizer of the base model, or of the folder `path`, once its files are what its run recorded."""
    from transformers import AutoTokenizer

    source = path or locate(model)
    if path:
        require_intact(Path(path))

    def load() -> Any:
        tokenizer = AutoTokenizer.from_pretrained(source, **_hub_options(model))
        tokenizer("a word")  # what is wrong in its files may show in its first use alone
        return tokenizer

    return _load(f"tokenizer in {path}" if path else "tokenizer", model, load)


def load_model(model: ModelSection, device: torch.device, precision: Precision) -> Any:
    """The base model with frozen weights on `device`, quantized where that is asked, in eval mode.

    Raises:
        ModelLoadingError: files are broken or missing, tensors are missing or of another shape.
        OutOfMemoryError: it does not fit.
        ConfigurationError: quantization without its package.
    """
    quantized = loading_options(model, precision)
    dtype = DTYPES[precision if model.dtype == "auto" else model.dtype]
    loaded = _with_weights(
        model, dtype=dtype, attn_implementation=_attention(model), device_map={"": device}, **quantized
    )
    return separate_examples(keep_trainable(_resized(loaded, model))).requires_grad_(False).eval()


def _with_weights(model: ModelSection, **options: Any) -> Any:
    """The model with every tensor from its files, none random."""
    from transformers import AutoConfig

    path = locate(model)
    always = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}

    def load() -> Any:
        found = load_class(AutoConfig.from_pretrained(path, **_hub_options(model)))
        return found.from_pretrained(path, **always, **options, **_hub_options(model))

    loaded, info = _load("weights", model, load)
    _refuse_random(model, sorted(info["missing_keys"]), sorted(info["mismatched_keys"]))
    return loaded


def _refuse_random(model: ModelSection, missing: list[str], mismatched: list[tuple[str, Any, Any]]) -> None:
    if missing:
        raise ModelLoadingError(
            f"model.id: the weights of '{model.id}' lack {len(missing)} of the model's tensors ({missing[0]}, ...), "
            "which would be random. The download is incomplete, or its config.json belongs to another model."
        )
    if mismatched:
        name, found, wanted = mismatched[0]
        raise ModelLoadingError(
            f"model.id: {len(mismatched)} tensors of '{model.id}' have another shape than its config.json says: {name} "
            f"has {tuple(found)}, expected {tuple(wanted)}. Its config.json belongs to another model."
        )


def build_skeleton(model: ModelSection) -> Any:
    """The base model without weights, on the meta device: every module with its sizes, for checks that cost no memory.

    Raises:
        ModelLoadingError: the configuration is none of a causal language model.
    """
    from transformers import AutoConfig

    path = locate(model)

    def build() -> Any:
        config = AutoConfig.from_pretrained(path, **_hub_options(model))
        if hasattr(config, "quantization_config"):  # modules of the sizes that they stand for
            del config.quantization_config
        with torch.device("meta"):
            return _resized(build_model(config, model.trust_remote_code), model)

    return _load("architecture", model, build).requires_grad_(False).eval()


def load_thinned(model: ModelSection, layers: int, device: torch.device, precision: Precision) -> Any:
    """A relative of the base with so many layers and random weights, as large as the base in all else: to measure.

    Raises:
        ModelLoadingError: its configuration does not say how many layers it has.
    """
    from transformers import AutoConfig

    path = locate(model)
    dtype = DTYPES[precision if model.dtype == "auto" else model.dtype]

    def build() -> Any:
        config = AutoConfig.from_pretrained(path, **_hub_options(model))
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        with torch.device(device):
            built = build_model(config, model.trust_remote_code, dtype=dtype, attn_implementation=_attention(model))
            return _resized(built, model)

    return _load("architecture", model, build).requires_grad_(False).eval()


def _resized(loaded: Any, model: ModelSection) -> Any:
    """The model with a row for each token of its tokenizer, where model.resize_embeddings asks for that."""
    return resize_embeddings(loaded, required_rows(load_tokenizer(model))) if model.resize_embeddings else loaded


def _attention(model: ModelSection) -> str | None:
    """None: transformers takes sdpa, or eager for an architecture that sdpa cannot compute (Gemma 2's soft caps)."""
    return None if model.attention == "auto" else model.attention


def check_weights(model: ModelSection) -> None:
    """Refuse a local model whose weights `load_model` would refuse. Reads the headers of its files alone.

    Names and shapes are held against the model by loading onto the meta device, which renames and ties as loading does;
    files that are quantized already are left to `load_model`.

    Raises:
        ModelLoadingError: a file is cut short or missing, tensors are missing or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(locate(model))
    if not folder.is_dir():
        return
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelLoadingError(
                f"model.id: {folder / name} is broken or missing ({error}). Download the model again, whole."
            ) from error
    if "quantization_config" not in read_json(folder / "config.json"):
        _with_weights(model, device_map="meta")


def weight_files(folder: Path) -> list[str]:
    """The names of a local model's safetensors files; as in transformers, a single file goes before an index."""
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
    """Keep of each layer its input alone, and compute the layer again in the backward pass (arXiv 1604.06174).

    Dropout draws the same again, so losses and gradients are those without it.

    Raises:
        ConfigurationError: the model's code cannot.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigurationError(f"training.gradient_checkpointing: {error} Set it to false.") from error
