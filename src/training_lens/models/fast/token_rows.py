"""Embedding and output head with rows of new tokens, computed beside the frozen weight.

PEFT puts the rows into a copy of the whole weight in every pass, and its backward pass forms the gradient of the whole
weight to keep some rows of it. Here the rows are multiplied on their own, (new tokens, hidden), and the weight has no
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from training_lens.models.embedding_rows import token_wrappers
from training_lens.models.fast.install import ModuleKernel, install_kernel
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.tolerance import is_close
from training_lens.models.model_classes import evaluation_mode


class TokenRows:
    """The trained rows of a module in PEFT's wrapper: `values` (rows, width) in float32, `ids` their tokens (rows,).

    Raises:
        UnknownLayerError: it has several adapters, or a merged one.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper, self._layer = wrapper, wrapper.token_adapter
        if len(self._layer.trainable_tokens_delta) != 1 or self._layer.merged:
            raise UnknownLayerError("rows of new tokens of several adapters")
        ((name, self.values),) = self._layer.trainable_tokens_delta.items()
        self.base = wrapper.original_module
        self.ids: Int[Tensor, " rows"] = torch.tensor(self._layer.token_indices[name], device=self.base.weight.device)

    @property
    def is_active(self) -> bool:
        """Whether the adapter is switched on."""
        return bool(self._wrapper.active_adapters) and not (self._wrapper.disable_adapters or self._layer.merged)


class EmbeddingRowsKernel(ModuleKernel):
    """An embedding with rows of new tokens."""

    def __init__(self, module: Any, _spec: None = None) -> None:
        super().__init__(module, 1)
        self.rows = TokenRows(module)
        if not isinstance(self.rows.base, nn.Embedding):
            raise UnknownLayerError(f"rows of new tokens in a {type(self.rows.base).__name__}")
        weight = self.rows.base.weight
        self._places = torch.full((len(weight),), -1, device=weight.device)  # of a token's row; -1: it has none
        self._places[self.rows.ids] = torch.arange(len(self.rows.ids), device=weight.device)

    def __call__(self, ids: Tensor) -> Tensor:  # (rows, width) -> (rows, width, hidden)
        rows = self.rows
        found: Tensor = rows.base(ids)
        if not rows.is_active:
            return found
        places = self._places[ids]
        own = embedding(places.clamp(min=0), rows.values).to(found.dtype)
        scale = getattr(rows.base, "embed_scale", None)
        if scale is not None:
            own = own * torch.as_tensor(scale, device=own.device).to(own.dtype)
        return torch.where((places >= 0)[..., None], own, found)

    @torch.no_grad()
    def matches_module(self) -> bool:
        """Whether it gives what the module itself gives, for new tokens and some others."""
        ids = torch.cat([self.rows.ids, torch.arange(min(4, len(self._places)), device=self.rows.ids.device)])[None]
        with evaluation_mode(self.module):
            return is_close(self(ids), self.plain(ids))


class HeadRowsKernel(ModuleKernel):
    """An output head with rows of new tokens, whose logits take the place of those that the frozen weight gives."""

    def __init__(self, module: Any, _spec: None = None) -> None:
        self.rows = TokenRows(module)
        base = self.rows.base
        if type(base) is not nn.Linear or base.bias is not None or not base.weight.is_floating_point():
            raise UnknownLayerError(f"rows of new tokens in a {type(base).__name__}")
        super().__init__(module, base.in_features)

    def __call__(self, x: Float[Tensor, "*tokens hidden"]) -> Tensor:
        found: Tensor = self.rows.base(x)
        if not self.rows.is_active:
            return found
        own = linear(x, self.rows.values.to(self.rows.base.weight.dtype))
        return found.index_copy(-1, self.rows.ids, own.to(found.dtype))


def install_token_rows(model: Any) -> list[str]:
    """Let kernels compute embedding and head of a PEFT model with new tokens, in place.

    Returns why not, '' for each that a kernel computes; nothing for a model without new tokens.
    """
    refusals = []
    for _, wrapper in token_wrappers(model):
        is_embedding = isinstance(wrapper.original_module, nn.Embedding)
        refusals.append(install_kernel(wrapper, EmbeddingRowsKernel if is_embedding else HeadRowsKernel, None))
    return refusals


def head_rows(head: Any) -> TokenRows | None:
    """The rows of new tokens of an output head that a kernel computes."""
    kernel = head.__dict__.get("forward")
    return kernel.rows if isinstance(kernel, HeadRowsKernel) else None
