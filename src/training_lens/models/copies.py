"""Plain models out of an adapted one: the base alone, or the adapter merged. They share what they do not change."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from training_lens.errors import AdapterError
from training_lens.models.fast.install import installed_kernels, uninstall_kernels


def base_copy(model: Any) -> Any:
    """The base without any adapter layers, as it was loaded; every tensor is the adapted model's own.

    Args:
        model: from `adapters.load_adapter` or `attach`; it stays as it is.
    """
    copied = sharing_copy(model)
    _put_back_originals(copied)
    return copied.unload()


def merged_copy(model: Any) -> Any:
    """The model with its adapter merged into its weights, W + scale B A for LoRA, without any adapter layers.

    Costs the memory of the adapted layers' weights once more; all other tensors are the adapted model's own, and it
    stays as it is. In float32 the two differ by rounding; else the sum is rounded to the weights' number type.

    Raises:
        AdapterError: the base is quantized, so that merging would round its weights anew.
    """
    if is_quantized(model):
        raise AdapterError("the base is quantized, and merging would round its weights anew. Load it unquantized.")
    copied = sharing_copy(model)
    for layer in [m.base_layer for m in copied.modules() if hasattr(m, "base_layer")]:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
    with warnings.catch_warnings():
        # An adapted head that was tied to the embedding has come apart above: the embedding was never adapted.
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        return copied.merge_and_unload()


def is_quantized(model: Any) -> bool:
    """Whether the weights below the adapter are in 4 or 8 bits."""
    return getattr(model.config, "quantization_config", None) is not None


def sharing_copy(model: Any) -> Any:
    """A deep copy of the model's modules around the model's own tensors; hooks are the same ones, and not copies.

    The copy's modules compute by themselves. A copy that is dropped is freed at once: a kernel and the module that it
    computes hold each other, and with them the weights that lie joined in the kernel.
    """
    hooks = [
        hook
        for module in model.modules()
        for held in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in held.values()
    ]
    kept = [*model.parameters(), *model.buffers(), *hooks, *installed_kernels(model)]
    copied = copy.deepcopy(model, {id(one): one for one in kept})
    uninstall_kernels(copied)
    return copied


def _put_back_originals(model: Any) -> None:
    """Modules that were trained whole are those of the base again: `unload` alone would keep the trained ones."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper.original_module)
