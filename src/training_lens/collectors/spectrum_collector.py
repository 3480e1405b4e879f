"""The singular values of what the adapter adds, and how DoRA has moved lengths and directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.module_batches import Factors
from training_lens.core.modules import AdapterModule
from training_lens.core.registry import CollectorRegistry
from training_lens.core.types import Cadence, Captured, DataType
from training_lens.measures import singular_values as spectra


@CollectorRegistry.register
class SpectraCollector(DataCollector):
    """Singular values of dW and what is read from them (table `spectra`); of DoRA also how far rows of W have moved.

    Of PiSSA, dW is whole, and `top_ratio` is that of the trained halves. `magnitude_change` and `direction_change` are
    NaN for a module without DoRA or without a single weight matrix, and are left out where no module has DoRA.

    Cost: two QR decompositions and an SVD in rank dimensions for each shape, waiting for the device on CUDA; for DoRA a
    float32 copy of one W at a time.
    """

    name, data_type, cadence = tables.SPECTRA, DataType.ADAPTER_WEIGHTS, Cadence.SPECTRA

    def collect(self, watched: Watched, step: int) -> Captured:
        """Of the weights after the update."""
        parts, values = [], []
        for group, after in zip(watched.groups, watched.after, strict=True):
            whole = group.whole(after)
            values.append(spectra.singular_values(whole.a, whole.b, group.scaling))  # (modules of the group, k)
            parts.append(_measures(values[-1], after))
        scalars = watched.groups.joined_all(parts) | _changes(watched.modules)
        return Captured(scalars, {"singular_values": _in_order(watched, values)}, rows=watched.names)


def _measures(singular: Tensor, after: Factors) -> dict[str, Tensor]:
    """Each (modules of the group,)."""
    return {
        "effective_rank": spectra.effective_rank(singular),
        "stable_rank": spectra.stable_rank(singular),
        "energy_rank": spectra.energy_rank(singular),
        "top_ratio": spectra.top_ratio(after.a, after.b),
    }


def _in_order(watched: Watched, stacks: Sequence[Tensor]) -> list[Tensor]:
    """Rows of stacks of different width, in the model's order."""
    positions = [i for group in watched.groups for i in group.positions]
    rows = dict(zip(positions, (row for stack in stacks for row in stack), strict=True))
    return [rows[i] for i in range(len(rows))]


def _changes(modules: Sequence[AdapterModule]) -> dict[str, Tensor]:
    """DoRA's measures, each (modules,); none where no module has DoRA."""
    if all(module.magnitude is None for module in modules):
        return {}
    magnitude, direction = zip(*(_change(module) for module in modules), strict=True)
    return {"magnitude_change": torch.stack(magnitude), "direction_change": torch.stack(direction)}


def _change(module: AdapterModule) -> tuple[Tensor, Tensor]:
    weight = module.base_weight() if module.magnitude is not None else None
    if weight is None or module.magnitude is None:
        unknown = torch.tensor(torch.nan, dtype=torch.float64)
        return unknown, unknown
    a, b = module.factors()
    changes = spectra.dora_change(weight, a, b, module.record.scaling, module.magnitude.detach())
    return changes[0].cpu(), changes[1].cpu()  # at intervals, waiting for the device costs little
