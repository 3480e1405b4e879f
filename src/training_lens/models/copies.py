"""Plain copies of an adapted model, the base alone or with the adapter merged. They share unchanged tensors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from training_lens.errors import AdapterError
from training_lens.models.embedding_rows import token_wrappers
from training_lens.models.fast.install import installed_kernels, uninstall_kernels
from training_lens.models.model_classes import unwrap_adapter
from training_lens.models.quantization import is_quantized


def copy_base(model: Any) -> Any:
    """The base without adapter layers, as it was loaded; shares every tensor with `model`, which is not changed."""
    from peft.utils import ModulesToSaveWrapper

    copied = copy_sharing_weights(model)
    for name, wrapper in [(n, m) for n, m in copied.named_modules() if isinstance(m, ModulesToSaveWrapper)]:
        copied.set_submodule(name, wrapper.original_module)  # trained whole: `unload` alone would keep it
    return copied.unload()


def copy_merged(model: Any) -> Any:
    """The model with its adapter merged into its weights, W + scale B A for LoRA, without adapter layers.

    Memory: the adapted layers' weights once more; all other tensors are shared with the adapted model, which is not
    changed. In float32 the two differ by rounding; otherwise the sum is rounded to the weights' dtype.

    Raises:
        AdapterError: the base is quantized, so merging would round its weights again.
    """
    if is_quantized(model):
        raise AdapterError("the base is quantized, and merging would round its weights anew. Load it unquantized.")
    copied = copy_sharing_weights(model)
    merge_token_rows(copied)
    for layer in [m.base_layer for m in copied.modules() if hasattr(m, "base_layer")]:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
    with warnings.catch_warnings():
        # An adapted head that was tied to the embedding has come apart above: the embedding was never adapted.
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        return copied.merge_and_unload()


@torch.no_grad()
def merge_token_rows(copied: Any) -> None:
    """Put plain modules with the trained rows of new tokens in the place of PEFT's wrappers, in a copy of a model.

    Tied weights stay tied. Memory: embedding and output head once more.
    """
    weights: dict[int, torch.nn.Parameter] = {}
    plain_model = unwrap_adapter(copied)
    for path, wrapper in list(token_wrappers(copied)):
        plain, own = wrapper.original_module, id(wrapper.original_module.weight)
        if own not in weights:
            weights[own] = torch.nn.Parameter(wrapper.weight.detach().clone(), requires_grad=False)
        plain.weight = weights[own]
        plain_model.set_submodule(path, plain)


def copy_sharing_weights(model: Any) -> Any:
    """A deep copy of the model's modules around the model's own tensors; hooks are shared, not copied.

    No kernels are installed in the copy, so it is freed as soon as it is dropped: a kernel and its module refer to each
    other, and would keep the kernel's fused weights alive.
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
