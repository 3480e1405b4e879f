"""Frozen weights in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.models.model_classes import unwrap_adapter
from training_lens.utils.devices import DTYPES, Precision


def require_bitsandbytes(key: str) -> Any:
    """The bitsandbytes package, which the config's `key` needs.

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
    """Check what the config needs of bitsandbytes.

    Raises:
        ConfigurationError: it is not installed, or cannot do this on this device.
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
    """The model, with any 4-bit weights kept in the form that passes gradients.

    On some CPUs bitsandbytes repacks them for inference in bfloat16 in the first forward pass without gradients, such
    as a validation; training would then continue without a gradient through these layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def loading_options(model: ModelSection, precision: Precision) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that quantize every linear layer but the head; empty for `none`.

    4bit is NF4 with double quantization (QLoRA, arXiv 2305.14314), multiplied in `precision`; 8bit is LLM.int8()
    (arXiv 2208.07339). The rest of PEFT's k-bit preparation is not needed: the weights are frozen, norms compute in
    float32, and checkpointing is not reentrant.

    Raises:
        ConfigurationError: bitsandbytes is not installed.
    """
    if model.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    require_bitsandbytes("model.quantization")
    options: dict[str, Any] = {"load_in_8bit": True}
    if model.quantization == "4bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": DTYPES[precision],
        }
    return {"quantization_config": BitsAndBytesConfig(**options)}


def is_quantized(model: Any) -> bool:
    """Whether the base's weights are in 4 or 8 bits, by this run's config or by its own."""
    return getattr(unwrap_adapter(model), "hf_quantizer", None) is not None


def has_8bit_layers(model: Any) -> bool:
    """Whether the model has bitsandbytes' layers of 8 bits, which change their weights in their first pass."""
    return any(hasattr(module, "init_8bit_state") for module in model.modules())


def element_count(parameter: torch.nn.Parameter) -> int:
    """The number of weights in a parameter; a packed 4-bit one has its shape in its quantization state.

    A sharded one has lost that: two weights are in each of its bytes.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
    return int(torch.Size(state.shape).numel())


def dequantize_model(model: Any) -> Any:
    """Replace each quantized layer by a plain one with float32 weights, in place, and update the config.

    Memory: 4 bytes a weight in place of the packed ones, converted one layer at a time.
    """
    if not is_quantized(model):
        return model
    from peft.utils.integrations import dequantize_module_weight

    bitsandbytes = require_bitsandbytes("model.quantization")
    quantized = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    for path, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, quantized)]:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(dequantize_module_weight(layer).detach().float(), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain)
    model.hf_quantizer.remove_quantization_config(model)
    return model
