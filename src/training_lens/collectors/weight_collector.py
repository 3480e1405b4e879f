"""The adapter's weights, the frozen weights under them, and snapshots of the whole adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.module_batches import ModuleBatch
from training_lens.core.modules import AdapterModule
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Cadence, Captured, DataType
from training_lens.measures.adapter_measures import adapter_norms
from training_lens.measures.factors import Factors
from training_lens.measures.singular_values import top_singular_value


@CollectorRegistry.register
class AdapterWeightsCollector(DataCollector):
    """Norms of A, B and dW, and how far the step moved dW (table `adapter_weights`).

    With PiSSA, A, B and their balance are those of the trained halves, and dW includes the frozen ones. `norm_step` is
    NaN where the weights before the step were not captured.

    Cost: about ten passes over the adapter's parameters, with PiSSA in float64; no synchronisation.
    """

    name, data_type = tables.WEIGHTS, DataType.ADAPTER_WEIGHTS

    def collect(self, context: CaptureContext, step: int) -> Captured:
        """Measure the weights after the update."""
        before: Sequence[Factors | None] = context.before or [None] * len(context.after)
        batches = zip(context.batches, before, context.after, strict=True)
        parts = [_measure_batch(*batch) for batch in batches]
        return Captured(context.batches.restore_order_all(parts), rows=context.module_names)


def _measure_batch(batch: ModuleBatch, before: Factors | None, after: Factors) -> dict[str, Tensor]:
    """Each (modules of the batch,)."""
    full = batch.full_factors(after)
    return adapter_norms(after, batch.scaling, None if full is after else full, before)  # PiSSA's other half stays


@CollectorRegistry.register
class BaseWeightsCollector(DataCollector):
    """Norm and largest singular value of each frozen weight W, once, as step 0 (table `base_weights`).

    NaN where a module has no single weight matrix.

    Cost: before the first step, a float32 copy of one W at a time (dequantized if quantized), and 33 products of it
    with a vector.
    """

    name, data_type, cadence = tables.BASE, DataType.ADAPTER_WEIGHTS, Cadence.SNAPSHOTS

    def start(self, context: CaptureContext) -> Captured:
        """Measure the frozen weights, which never change."""
        norms, tops = zip(*(_measure_base(module) for module in context.modules), strict=True)
        return Captured({"norm": torch.stack(norms), "top": torch.stack(tops)}, rows=context.module_names)

    def collect(self, context: CaptureContext, step: int) -> None:
        """Nothing after step 0."""


def _measure_base(module: AdapterModule) -> tuple[Tensor, Tensor]:
    weight = module.base_weight()
    if weight is None:
        unknown = torch.tensor(torch.nan)
        return unknown, unknown
    return vector_norm(weight).cpu(), top_singular_value(weight).cpu()  # before the first step, waiting costs nothing


@CollectorRegistry.register
class AdapterSnapshotsCollector(DataCollector):
    """The whole adapter (table `adapters`): tensors `{module}.a`, `{module}.b`, and with DoRA `{module}.magnitude`.

    dW = scaling b @ a, always: with PiSSA the frozen halves are included. The dtype is the adapter's.

    Cost: the store copies the tensors to the CPU, which waits for the device.
    """

    name, data_type, cadence = tables.SNAPSHOTS, DataType.ADAPTER_WEIGHTS, Cadence.SNAPSHOTS

    def collect(self, context: CaptureContext, step: int) -> Captured:
        """Take the parameters as they are."""
        tensors: dict[str, Tensor] = {}
        for module in context.modules:
            tensors[f"{module.name}.a"], tensors[f"{module.name}.b"] = module.factors()
            if module.magnitude is not None:
                tensors[f"{module.name}.magnitude"] = module.magnitude.detach()
        return Captured(tensors=tensors, rows=())
