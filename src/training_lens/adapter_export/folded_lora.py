"""The low-rank updates of a PEFT model with every scale folded into B: what a program needs that knows only B A.

PEFT's update of a module is s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), and alpha and
r of each module from patterns. Programs that take one alpha and one rank for all modules get another scale, silently.
Folded, B' = s B and s' = 1 for every module, so there is nothing left to read wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from training_lens.errors import AdapterError
from training_lens.models.adapter_scale import adapter_layers, base_module, factors_of
from training_lens.models.embedding_rows import has_token_rows
from training_lens.models.omissions import is_linear

MERGE_INSTEAD = "Merge it: training-lens merge writes plain weights that every program loads."


@dataclass(frozen=True)
class FoldedModule:
    """The update B A of one module's weight as (out, in), float32; of an embedding, of its weight's transpose."""

    path: str  # in the base
    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank), with the scale
    is_embedding: bool

    @property
    def rank(self) -> int:
        return len(self.a)

    def pad_rank(self, rank: int) -> FoldedModule:
        """The same update with rows of zeros in A and columns of zeros in B, up to `rank`."""
        more = rank - self.rank
        a = torch.nn.functional.pad(self.a, (0, 0, 0, more))
        return replace(self, a=a, b=torch.nn.functional.pad(self.b, (0, more)))


@torch.no_grad()
def fold_updates(adapted: Any, scale: float, form: str) -> list[FoldedModule]:
    """The updates of every adapted module times `scale`, at their own ranks.

    Args:
        adapted: a PEFT model.
        form: what is written, for messages: 'a plain LoRA'.

    Raises:
        AdapterError: a module's update is not B A times a number: DoRA, modules trained whole, fused experts.
    """
    return [_fold_module(path, layer, scale, form) for path, layer in adapter_layers(adapted)]


def _fold_module(path: str, layer: Any, scale: float, form: str) -> FoldedModule:
    _require_low_rank(path, layer, form)
    (name,) = layer.active_adapters
    a, b = factors_of(layer, name)
    factor = scale * layer.scaling[name]
    folded = (factor * b.detach().double()).float().cpu()
    return FoldedModule(path, a.detach().float().cpu(), folded, name in layer.lora_embedding_A)


def _require_low_rank(path: str, layer: Any, form: str) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.lora.variants import DoraLinearVariant

    if has_token_rows(layer):
        raise AdapterError(
            f"'{path}' has rows of its own for new tokens (data.new_tokens), which the base lacks, and {form} has no "
            f"place for them. {MERGE_INSTEAD} For llama.cpp: --to gguf --merged."
        )
    if not isinstance(layer, LoraLayer):
        raise AdapterError(
            f"'{path}' was trained whole (modules_to_save, or model.resize_embeddings), and {form} holds low-rank "
            f"updates alone. {MERGE_INSTEAD}"
        )
    if any(isinstance(variant, DoraLinearVariant) for variant in layer.lora_variant.values()):
        raise AdapterError(
            f"'{path}' is adapted by DoRA, whose update depends on the base's weights and has full rank: no plain LoRA "
            f"computes it. {MERGE_INSTEAD}"
        )
    if isinstance(layer, ParamWrapper):
        raise AdapterError(
            f"'{path}' adapts a layer's experts, which share one parameter, and {form} has places only for linear "
            f"layers. {MERGE_INSTEAD}"
        )
    base = base_module(layer)
    is_plain = not layer.lora_variant and not any(layer.lora_bias.values())
    if not is_plain or not (is_linear(base) or isinstance(base, torch.nn.Embedding)):
        raise AdapterError(
            f"'{path}' carries a {type(layer).__name__} on a {type(base).__name__}, whose update {form} cannot hold; "
            f"only LoRA on linear layers and embeddings can be exported. {MERGE_INSTEAD}"
        )


def pad_to_one_rank(modules: Sequence[FoldedModule]) -> list[FoldedModule]:
    """All modules at the largest rank among them."""
    rank = max(module.rank for module in modules)
    return [module.pad_rank(rank) for module in modules]


def short_target_names(paths: Sequence[str], all_paths: Sequence[str]) -> list[str]:
    """The last parts of `paths` where these match nothing else in the model, otherwise the whole paths; sorted."""
    names = {path.rpartition(".")[2] for path in paths}
    others = set(all_paths).difference(paths)
    ambiguous = {path.rpartition(".")[2] for path in others} & names
    return sorted(set(_name_targets(paths, ambiguous)))


def _name_targets(paths: Sequence[str], ambiguous: set[str]) -> Iterator[str]:
    for path in paths:
        last = path.rpartition(".")[2]
        yield path if last in ambiguous else last
