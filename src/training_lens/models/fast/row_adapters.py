"""Several adapters beside one decoder's weights: each row of a batch has its own, at its own scale, or none.

For a row with W' = W + s B A the update x (W' - W)^T is computed from A and B, and added to the output of the base's
layer. With DoRA, whose row i is g_i (w_i + s (B A)_i) with g = m / |W + s B A| (arXiv 2402.09353), the update is
(g - 1) x W^T + g s x (B A)^T. A scale multiplies the update: scale 0 is the base. All is computed in float32, as in
PEFT, until the sum is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from training_lens.models.embedding_rows import has_token_rows
from training_lens.models.fast.fused_linear import FusedLinear, active_branch, layer_refusal
from training_lens.models.fast.kernels import row_norms
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.native.decoding_kernels import LoRABranches
from training_lens.models.fast.native.library import can_compute


@dataclass(frozen=True)
class AdapterOfRow:
    """Which of a decoder's adapters a row is computed with; `scale` multiplies its update."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class LayerFactors:
    """One layer's adapter in float32: A (rank, in), s B (out, rank), and DoRA's g (out,) with the layer's bias."""

    down: Tensor
    up: Tensor
    gains: Tensor | None = None
    bias: Tensor | None = None


def read_factors(adapted: Any) -> dict[str, LayerFactors]:
    """Copies of the factors of a PEFT model's active adapter, by the paths of their layers in the base.

    Raises:
        UnknownLayerError: it changes more than linear layers by LoRA or DoRA, such as rows of new tokens.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    factors: dict[str, LayerFactors] = {}
    for path, layer in adapted.get_base_model().named_modules():
        if has_token_rows(layer):
            raise UnknownLayerError(f"'{path}' has rows of its own for new tokens")
        if isinstance(layer, AuxiliaryTrainingWrapper):
            raise UnknownLayerError(f"'{path}' is trained whole")
        if isinstance(layer, BaseTunerLayer):
            if reason := layer_refusal(layer, decodes=True):
                raise UnknownLayerError(f"'{path}' has {reason}")
            factors[path] = _copy_factors(layer)
    return factors


@torch.no_grad()
def _copy_factors(layer: Any) -> LayerFactors:
    branch, base = active_branch(layer), layer.get_base_layer()
    assert branch is not None
    down, up = branch.down.detach().float().clone(), branch.scale * branch.up.detach().float()
    if branch.magnitude is None:
        return LayerFactors(down, up)
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.T  # Conv1D keeps (in, out)
    gains = branch.magnitude / row_norms(weight, branch.down, branch.up, branch.scale)
    return LayerFactors(down, up, gains.float(), None if base.bias is None else base.bias.float())


class _LayerUpdate:
    """One adapter's update of a layer, or of layers whose outputs lie side by side."""

    def __init__(self, parts: Sequence[LayerFactors | None], sizes: Sequence[int], weight: Tensor) -> None:
        width = next(part.down.shape[1] for part in parts if part)
        empty = [LayerFactors(weight.new_empty(0, width).float(), weight.new_empty(n, 0).float()) for n in sizes]
        filled = [part or none for part, none in zip(parts, empty, strict=True)]
        self._down = torch.cat([part.down for part in filled])  # (ranks, in)
        self._up = torch.block_diag(*(part.up for part in filled))  # (outs, ranks)
        self._gains, self._bias = _join_gains(filled, sizes)
        factors = [(part.down, part.up) for part in filled]
        is_plain = self._gains is None and can_compute(weight)
        self._branches = LoRABranches(factors, weight.dtype) if is_plain else None

    def add_to_all(self, x: Tensor, out: Tensor, scale: float) -> None:
        """Add the update of every row of x, (rows, ..., in), to out, (rows, ..., outs)."""
        if self._branches and scale == 1 and out.is_contiguous():
            self._branches.add_to(x.flatten(0, -2), out.flatten(0, -2))
            return
        low = nn.functional.linear(x.float(), self._down)  # (rows, ..., ranks)
        update = nn.functional.linear(low, self._up)
        if self._gains is not None:
            base = out.float() if self._bias is None else out.float() - self._bias
            update = self._gains * update + (self._gains - 1) * base
        out.copy_(out + scale * update)


def _join_gains(parts: Sequence[LayerFactors], sizes: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """DoRA's factors and biases side by side, 1 and 0 for layers without; None where no layer has them."""
    if all(part.gains is None for part in parts):
        return None, None
    like = parts[0].down
    gains = [like.new_ones(n) if p.gains is None else p.gains for p, n in zip(parts, sizes, strict=True)]
    biases = [like.new_zeros(n) if p.bias is None else p.bias for p, n in zip(parts, sizes, strict=True)]
    return torch.cat(gains), torch.cat(biases)


class RowAdapters:
    """Adapters that hooks on a decoder's layers add to the rows that `select_rows` named last.

    Args:
        model: a decoder's copy of the base, whose fused layers were built of those in `paths`, by id.
        factors: of each adapter, see `read_factors`.

    Raises:
        UnknownLayerError: an adapted layer is not found in the decoder.
    """

    def __init__(self, model: Any, paths: Mapping[int, str], factors: Mapping[str, Mapping[str, LayerFactors]]) -> None:
        self._rows: Sequence[AdapterOfRow | None] = ()
        self._groups: list[tuple[AdapterOfRow, Tensor | None]] = []  # None: all rows
        self._device, self._hooks = model.device, list[RemovableHandle]()
        adapted = {path for of_adapter in factors.values() for path in of_adapter}
        found: set[str] = set()
        for layer, parts, sizes, weight in _list_layers(model, paths):
            used = [part for part in parts if part in adapted]
            if used:
                found.update(used)
                updates = {
                    name: _LayerUpdate([own.get(part) for part in parts], sizes, weight)
                    for name, own in factors.items()
                    if any(part in own for part in parts)
                }
                self._hook_layer(layer, updates)
        if missing := sorted(adapted - found):
            raise UnknownLayerError(f"'{missing[0]}' is no layer of its own in the decoder")

    def select_rows(self, rows: Sequence[AdapterOfRow | None]) -> None:
        """Say which adapter each row of the next forward pass has."""
        if list(rows) == self._rows:
            return
        self._rows = list(rows)
        chosen = dict.fromkeys(row for row in rows if row is not None and row.scale != 0)
        self._groups = [(choice, self._index_rows(choice)) for choice in chosen]

    def _index_rows(self, choice: AdapterOfRow) -> Tensor | None:
        """The rows of one choice; None for all."""
        if all(row == choice for row in self._rows):
            return None
        rows = [i for i, row in enumerate(self._rows) if row == choice]
        return torch.tensor(rows, device=self._device)

    def _hook_layer(self, layer: Any, updates: Mapping[str, _LayerUpdate]) -> None:
        def add_updates(_module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            if self._groups and len(out) != len(self._rows):
                raise UnknownLayerError(f"a {type(layer).__name__} is called with {len(out)} of {len(self._rows)} rows")
            for choice, rows in self._groups:
                if choice.name in updates:
                    _add_to_rows(updates[choice.name], given[0], out, rows, choice.scale)

        self._hooks.append(layer.register_forward_hook(add_updates))

    def remove(self) -> None:
        """Take the adapters out of the decoder."""
        for hook in self._hooks:
            hook.remove()


def _add_to_rows(update: _LayerUpdate, x: Tensor, out: Tensor, rows: Tensor | None, scale: float) -> None:
    if rows is None:
        update.add_to_all(x, out, scale)
        return
    own = out.index_select(0, rows)
    update.add_to_all(x.index_select(0, rows), own, scale)
    out.index_copy_(0, rows, own)


def _list_layers(
    model: Any, paths: Mapping[int, str]
) -> Iterator[tuple[Any, tuple[str, ...], tuple[int, ...], Tensor]]:
    """Each linear layer of a decoder, with the paths of the base's layers in it, their outputs and a weight's like."""
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear):
            like = next(model.parameters())
            yield module, tuple(paths[layer_id] for layer_id in module.layer_ids), module.sizes, like
        elif isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2:
            is_linear = isinstance(module, nn.Linear)
            yield module, (path,), (module.weight.shape[0 if is_linear else 1],), module.weight
