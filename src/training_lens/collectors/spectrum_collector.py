"""The singular values of what the adapter adds, and how DoRA changes lengths and directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.modules import AdapterModule
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Cadence, Captured, DataType
from training_lens.measures.adapter_measures import update_spectrum
from training_lens.measures.singular_values import dora_change


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
    magnitude, direction = zip(*(_measure_dora_module(module) for module in modules), strict=True)
    return {"magnitude_change": torch.stack(magnitude), "direction_change": torch.stack(direction)}


def _measure_dora_module(module: AdapterModule) -> tuple[Tensor, Tensor]:
    weight = module.base_weight() if module.magnitude is not None else None
    if weight is None or module.magnitude is None:
        unknown = torch.tensor(torch.nan, dtype=torch.float64)
        return unknown, unknown
    a, b = module.factors()
    changes = dora_change(weight, a, b, module.record.scaling, module.magnitude.detach())
    return changes[0].cpu(), changes[1].cpu()  # rare enough that waiting for the device costs little
