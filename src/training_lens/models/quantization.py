"""Frozen weights in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.utils.devices import DTYPES, Precision


def require_bitsandbytes(key: str) -> Any:
    """The bitsandbytes package, for what the config's `key` asks.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigurationError(
            f"{key}: needs the package bitsandbytes ({error}): pip install 'training-lens[quantization]'"
        ) from error
    return bitsandbytes


def check_quantization(config: TrainingConfig, device: torch.device) -> None:
    """What the config asks of bitsandbytes.

    Raises:
        ConfigurationError: it is not installed, or does not do that on this device.
    """
    for section, name in (("model", "quantization"), ("training", "optimizer")):
        if getattr(getattr(config, section), name) in ("4bit", "8bit", "adamw_8bit"):
            require_bitsandbytes(f"{section}.{name}")
    if config.model.quantization == "8bit" and config.peft.use_dora and device.type == "cpu":
        raise ConfigurationError(
            "model.quantization: 8bit with peft.use_dora needs CUDA (on the CPU the weights lose their scales); "
            "give 4bit, or use_dora=false."
        )


def keep_trainable(model: Any) -> Any:
    """The model, its 4-bit weights (if it has any) in the one form that passes gradients back.

    On some CPUs bitsandbytes packs them anew in the first forward pass without gradients, which validating is, into a
    form for inference in bfloat16; training behind that would go on with no gradient through these layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def loading_options(model: ModelSection, precision: Precision) -> dict[str, Any]:
    """What `from_pretrained` takes to quantize every linear layer but the head while loading; nothing for `none`.

    4bit is NF4 with double quantization (QLoRA, arXiv 2305.14314), multiplied in `precision`; 8bit is LLM.int8()
    (arXiv 2208.07339). Of PEFT's preparation for k-bit training nothing else is needed: the weights are frozen, norms
    compute in float32 by themselves, and checkpointing is not reentrant.

    Raises:
        ConfigurationError: bitsandbytes is not installed.
    """
    if model.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    require_bitsandbytes("model.quantization")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if model.quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[precision],
        )
    )
    return {"quantization_config": config}


def is_quantized(model: Any) -> bool:
    """Whether the base is kept in fewer bits than it computes in, by this run's config or by its own."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(whole, "hf_quantizer", None) is not None


def element_count(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter; 4-bit ones are packed, and their state knows the shape that they have."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def dequantize(model: Any) -> Any:
    """The model with each packed layer as a plain one of float32 weights, and a config that says so; changed in place.

    Memory: 4 bytes a weight in place of the packed ones, a layer at a time.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    from peft.utils.integrations import dequantize_module_weight

    bitsandbytes = require_bitsandbytes("model.quantization")
    packed = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    for path, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, packed)]:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(dequantize_module_weight(layer).detach().float(), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain)
    model.hf_quantizer.remove_quantization_config(model)
    return model
