"""The adapter's weights and spectra, the frozen weights under them, and snapshots of the whole adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, CollectorRegistry, DataCollector
from training_lens.core.modules import AdapterModule
from training_lens.core.types import Cadence, Captured, DataType
from training_lens.measures.adapter_measures import adapter_norms, update_spectrum
from training_lens.measures.factors import Factors
from training_lens.measures.singular_values import dora_change, top_singular_value
from training_lens.utils.devices import move_to_one_device


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
        parts = []
        for batch, old, new in zip(context.batches, before, context.after, strict=True):
            full = batch.full_factors(new)  # with PiSSA's other half, which stays
            parts.append(adapter_norms(new, batch.scaling, None if full is new else full, old))
        return Captured(context.batches.restore_order_all(parts), rows=context.module_names)


@CollectorRegistry.register
class SpectraCollector(DataCollector):
    """Singular values of dW and their ranks (table `spectra`); with DoRA, also how far the rows of W have moved.

    With PiSSA, dW includes the frozen halves, and `top_ratio` is that of the trained halves. `magnitude_change` and
    `direction_change` are NaN for a module without DoRA or without a single weight matrix; the columns are absent where
    no module has DoRA.

    Cost: two QR decompositions and an SVD in rank dimensions for each shape, waiting for the device on CUDA; with DoRA,
    a float32 copy of one W at a time.
    """

    name, data_type, cadence = tables.SPECTRA, DataType.ADAPTER_WEIGHTS, Cadence.SPECTRA

    def collect(self, context: CaptureContext, step: int) -> Captured:
        """Measure the weights after the update."""
        parts = [
            update_spectrum(batch.full_factors(after), after, batch.scaling)
            for batch, after in zip(context.batches, context.after, strict=True)
        ]
        singular = [part.pop("singular_values") for part in parts]  # (modules of the batch, k) each
        scalars = context.batches.restore_order_all(parts) | _measure_dora(context.modules)
        return Captured(scalars, {"singular_values": _restore_row_order(context, singular)}, rows=context.module_names)


def _restore_row_order(context: CaptureContext, batches: Sequence[Tensor]) -> list[Tensor]:
    """The rows of batches of different widths, in the model's order."""
    positions = [i for batch in context.batches for i in batch.positions]
    rows = dict(zip(positions, (row for batch in batches for row in batch), strict=True))
    return [rows[i] for i in range(len(rows))]


def _measure_dora(modules: Sequence[AdapterModule]) -> dict[str, Tensor]:
    """magnitude_change and direction_change, each (modules,); empty where no module has DoRA."""
    if all(module.magnitude is None for module in modules):
        return {}
    changes = []
    for module in modules:
        weight = module.base_weight() if module.magnitude is not None else None
        if weight is None or module.magnitude is None:
            changes.append(torch.full((2,), torch.nan))
            continue
        found = dora_change(weight, *module.factors(), module.record.scaling, module.magnitude.detach())
        changes.append(torch.stack(found).float())
    columns = torch.stack(move_to_one_device(changes), 1)
    return dict(zip(("magnitude_change", "direction_change"), columns, strict=True))


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
        norms, tops = torch.full((2, len(context.modules)), torch.nan)
        for i, module in enumerate(context.modules):
            weight = module.base_weight()
            if weight is not None:  # before the first step, waiting for the device costs nothing
                norms[i], tops[i] = vector_norm(weight), top_singular_value(weight)
        return Captured({"norm": norms, "top": tops}, rows=context.module_names)

    def collect(self, context: CaptureContext, step: int) -> None:
        """Nothing after step 0."""


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
