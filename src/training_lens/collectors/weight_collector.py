"""What the adapter's weights are, what the frozen ones were, and the adapter whole from time to time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from training_lens.core import table_names as tables
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.module_batches import Factors, Group
from training_lens.core.modules import AdapterModule
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Cadence, Captured, DataType
from training_lens.measures.factors import Grams, norm_of
from training_lens.measures.singular_values import (
    balance_of,
    step_norm,
    top_singular_value,
    update_norm,
    update_norm_of,
)


@CollectorRegistry.register
class AdapterWeightsCollector(DataCollector):
    """Norms of A, B and dW, and how far the step moved dW (table `adapter_weights`).

    Of PiSSA, A, B and their balance are those of the trained halves, and dW is the whole. `norm_step` is NaN where the
    weights before the step were not captured.

    Cost: some ten passes over the adapter's parameters, of PiSSA in float64, no synchronisation.
    """

    name, data_type = tables.WEIGHTS, DataType.ADAPTER_WEIGHTS

    def collect(self, watched: Watched, step: int) -> Captured:
        """Of the weights after the update."""
        before: Sequence[Factors | None] = watched.before or [None] * len(watched.after)
        parts = [_measures(*stacks) for stacks in zip(watched.groups, before, watched.after, strict=True)]
        return Captured(watched.groups.joined_all(parts), rows=watched.names)


def _measures(group: Group, before: Factors | None, after: Factors) -> dict[str, Tensor]:
    """Each (modules of the group,)."""
    grams = Grams.of(after.a, after.b)
    unknown = after.a.new_full((len(after.a),), torch.nan)
    return {
        "norm_a": norm_of(grams.a),
        "norm_b": norm_of(grams.b),
        "norm_update": _update_norm(group, after, grams),
        # the frozen halves of PiSSA do not move
        "norm_step": step_norm(before.a, before.b, after.a, after.b, group.scaling) if before else unknown,
        "balance": balance_of(grams),
    }


def _update_norm(group: Group, after: Factors, grams: Grams) -> Tensor:
    """(modules of the group,), of the whole dW; what trains of PiSSA cancels against its frozen half."""
    whole = group.whole(after)
    return update_norm_of(grams, group.scaling) if whole is after else update_norm(whole.a, whole.b, group.scaling)


@CollectorRegistry.register
class BaseWeightsCollector(DataCollector):
    """Norm and largest singular value of each frozen weight W, once, as step 0 (table `base_weights`).

    NaN where a module has no single weight matrix.

    Cost: before the first step, a float32 copy of one W at a time (dequantized where it is quantized), and 33 products
    of it with a vector.
    """

    name, data_type, cadence = tables.BASE, DataType.ADAPTER_WEIGHTS, Cadence.SNAPSHOTS

    def start(self, watched: Watched) -> Captured:
        """The frozen weights never change: this is all."""
        norms, tops = zip(*(_of_base(module) for module in watched.modules), strict=True)
        return Captured({"norm": torch.stack(norms), "top": torch.stack(tops)}, rows=watched.names)

    def collect(self, watched: Watched, step: int) -> None:
        """Nothing more."""


def _of_base(module: AdapterModule) -> tuple[Tensor, Tensor]:
    weight = module.base_weight()
    if weight is None:
        unknown = torch.tensor(torch.nan)
        return unknown, unknown
    return vector_norm(weight).cpu(), top_singular_value(weight).cpu()  # before the first step, waiting costs nothing


@CollectorRegistry.register
class AdapterSnapshotsCollector(DataCollector):
    """The adapter whole (table `adapters`): tensors `{module}.a`, `{module}.b`, and `{module}.magnitude` of DoRA.

    dW = scaling b @ a, always: of PiSSA they have the frozen halves. Their dtype is the adapter's.

    Cost: the store copies them to the CPU, which waits for the device.
    """

    name, data_type, cadence = tables.SNAPSHOTS, DataType.ADAPTER_WEIGHTS, Cadence.SNAPSHOTS

    def collect(self, watched: Watched, step: int) -> Captured:
        """The parameters as they stand."""
        return Captured(tensors={k: t for module in watched.modules for k, t in _tensors(module).items()}, rows=())


def _tensors(module: AdapterModule) -> dict[str, Tensor]:
    a, b = module.factors()
    found = {f"{module.name}.a": a, f"{module.name}.b": b}
    if module.magnitude is not None:
        found[f"{module.name}.magnitude"] = module.magnitude.detach()
    return found
