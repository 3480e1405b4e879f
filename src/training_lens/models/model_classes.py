"""The transformers class that a base is loaded as: the one that its own config.json names.

An adapter's tensors are named after the modules of that class. So a multimodal base is loaded whole, and not as its
text part: other programs load the class that config.json names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training_lens.errors import ModelLoadingError


def load_class(config: Any) -> Any:
    """The class whose `from_pretrained` loads the model that `config` describes.

    The generating class that `config.architectures` names, if transformers has it; otherwise AutoModelForCausalLM's for
    the model type, which also finds classes in the model's own repository.

    Raises:
        ModelLoadingError: an encoder-decoder, or a model type that does not generate text.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    named = next(iter(getattr(config, "architectures", None) or ()), None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadingError(
            f"model.id: '{config.name_or_path}' is an encoder-decoder ({named or config.model_type}), which reads the "
            "prompt with one half and answers with the other. Give a decoder-only model, such as Llama, Qwen or Gemma."
        )
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # in its folder or repository
    found = getattr(transformers, named, None) if named else None
    if is_generating(found) and not has_own_code:
        return found
    if has_own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    raise ModelLoadingError(
        f"model.id: '{config.name_or_path}' is a model of type '{config.model_type}'{f' ({named})' if named else ''}, "
        "which generates no text. Give a causal language model."
    )


def require_generating(config: Any) -> None:
    """Refuse what `load_class` refuses; a class that transformers lists for the model type is not imported for it.

    Raises:
        ModelLoadingError: as `load_class`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = next(iter(getattr(config, "architectures", None) or ()), None)
    is_listed = named is not None and MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) == named
    if not is_listed or getattr(config, "is_encoder_decoder", False):
        load_class(config)


def is_generating(found: Any) -> bool:
    """Whether this is a model class that can generate, so one with an output head over the vocabulary."""
    from transformers import GenerationMixin, PreTrainedModel

    return isinstance(found, type) and issubclass(found, PreTrainedModel) and issubclass(found, GenerationMixin)


def is_found_by_type(model: Any) -> bool:
    """Whether AutoModelForCausalLM gives the model's own class for its config, not its text part or nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = type(model).__module__.startswith("transformers.")
    return not known or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None) is type(model)


def build_model(config: Any, trust_remote_code: bool, **options: Any) -> Any:
    """A model of `config` in the class that loading uses, with random weights (none on the device 'meta')."""
    found = load_class(config)
    if hasattr(found, "from_config"):  # transformers' way to several classes
        return found.from_config(config, trust_remote_code=trust_remote_code, **options)
    return found._from_config(config, **options)


def unwrap_adapter(model: Any) -> Any:
    """The transformers model under PEFT's wrapper, adapter layers included; a model without a wrapper is returned."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_own_kernels(model: Any) -> bool:
    """Whether unsloth's kernels compute this model, with or without an adapter, so that ours are not installed."""
    return bool(getattr(unwrap_adapter(model), "has_own_kernels", False))


@contextmanager
def evaluation_mode(module: Any) -> Iterator[None]:
    """In the block the module is in evaluation mode, in which no dropout draws; then each part in its own again."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def public_class(model: Any) -> str:
    """The name of the transformers class with which other programs load this model's folder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    whole = unwrap_adapter(model)
    found, config = type(whole), type(whole.config)
    usual = MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
    is_named = found is not usual and getattr(transformers, found.__name__, None) is found
    return found.__name__ if is_named else "AutoModelForCausalLM"


def decoder_of(model: Any) -> Any:
    """The part of a model, with or without PEFT's wrapper, that computes the last hidden states.

    `get_decoder` returns the whole model for some classes, and for others a part with an output head of its own.

    Raises:
        ModelLoadingError: there is none.
    """
    from transformers import PreTrainedModel

    def has_head(part: Any) -> bool:
        return hasattr(part, "get_output_embeddings") and part.get_output_embeddings() is not None

    whole = unwrap_adapter(model)
    decoder = whole.get_decoder()
    while decoder is not None and (decoder is whole or has_head(decoder)):
        whole = decoder
        inner = next((child for child in whole.children() if isinstance(child, PreTrainedModel)), None)
        decoder = whole.base_model if whole.base_model is not whole else inner
    if decoder is None:
        raise ModelLoadingError(
            f"model.id: a {type(whole).__name__} has no decoder apart from its output head, which training asks for "
            "hidden states. Give another model."
        )
    return decoder
