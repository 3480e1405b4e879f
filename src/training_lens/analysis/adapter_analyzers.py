"""The parameters of one adapter in depth: spectra, ranks, balance, and their effect on the base weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from training_lens.analysis.saved_adapters import open_adapter, open_base_weights
from training_lens.analyzers.module_groups import json_number, json_numbers
from training_lens.core.modules import adapter_modules
from training_lens.core.types import ModuleRecord
from training_lens.measures import singular_values as spectra
from training_lens.measures.adapter_measures import adapter_norms, update_spectrum
from training_lens.measures.factors import Factors
from training_lens.utils.names import expand_home


@dataclass(frozen=True)
class AdaptedWeight:
    """One module's A (rank, in) and B (out, rank), DoRA's magnitude (out,), and W (out, in) if known."""

    record: ModuleRecord
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    weight: Tensor | None = None

    def describe_factors(self) -> dict[str, Any]:
        """Measures of A and B alone; `singular_values` are those of dW, descending."""
        factors, scaling = Factors(self.a, self.b), self.record.scaling
        spectrum = update_spectrum(factors, factors, scaling)
        singular = json_numbers(spectrum.pop("singular_values"))
        measured = adapter_norms(factors, scaling, full=factors) | spectrum
        del measured["norm_step"]  # there is only one step
        return {"singular_values": singular} | {name: json_number(value) for name, value in measured.items()}

    def compare_with_base(self, *, intruders: bool) -> dict[str, Any]:
        """Measures of dW relative to W; empty if W is unknown. DoRA: of its low-rank part, but for the last two."""
        if self.weight is None:
            return {}
        a, b, scaling, weight = self.a, self.b, self.record.scaling, self.weight
        singular = spectra.singular_values(a, b, scaling)
        directions = int(spectra.energy_rank(singular).nan_to_num(0))
        found = {
            "strength": spectra.update_norm(a, b, scaling) / matrix_norm(weight),
            "top_strength": singular[0] / spectra.top_singular_value(weight),
            "amplification": spectra.amplification(weight, a, b, scaling, directions) if directions else torch.nan,
        }
        if intruders:
            strange = spectra.find_intruders(weight, a, b, scaling)
            found |= {"intruders": strange.count, "intruder_energy_share": strange.energy_share}
        if self.magnitude is not None:
            changes = spectra.dora_change(weight, a, b, scaling, self.magnitude)
            found |= dict(zip(("magnitude_change", "direction_change"), changes, strict=True))
        return {name: json_number(value) for name, value in found.items()}


class LoRAParameterAnalyzer:
    """One adapter's parameters, module by module.

    Args:
        adapter: a PEFT folder, or a PEFT model.
        base: the model folder of a saved adapter; None: the one named in its configuration. Unused with a PEFT model.

    Raises:
        AdapterError: the folder has no LoRA or DoRA, or a broken one.
        LensError: the model has no LoRA, or `base` is another model.
        ModelLoadingError: `base` cannot be read.

    Example:
        rows = LoRAParameterAnalyzer("run/artifacts/adapter").table()
        max(rows, key=lambda row: row["strength"])["module"]
    """

    def __init__(self, adapter: Path | str | Any, base: Path | str | None = None) -> None:
        saved = isinstance(adapter, Path | str)
        self._opened = open_adapter(expand_home(adapter)) if saved else None
        self._weights = open_base_weights(self._opened, base) if self._opened else None
        self._modules = () if saved else adapter_modules(adapter)

    def table(self, *, intruders: bool = True) -> list[dict[str, Any]]:
        """One row per module: module, layer, kind, rank, the measures of A and B, and those relative to W.

        Non-finite numbers are None. Without the base, columns relative to W are missing.

        Args:
            intruders: include count and energy share of intruder dimensions, directions among the first ten of W + dW
                that W does not have (arXiv 2410.21228; their meaning for forgetting is disputed). Costs two SVDs per
                weight: seconds for a width of 1000, a minute for 4000.
        """
        return [
            {"module": one.record.name, "layer": one.record.layer, "kind": one.record.kind, "rank": one.record.rank}
            | one.describe_factors()
            | one.compare_with_base(intruders=intruders)
            for one in self.weights()
        ]

    @torch.no_grad()
    def weights(self) -> Iterator[AdaptedWeight]:
        """Each module with its factors and its W, with one W in memory at a time."""
        if self._opened is None:
            for module in self._modules:
                magnitude = None if module.magnitude is None else module.magnitude.detach()
                yield AdaptedWeight(module.record, *module.factors(), magnitude, module.base_weight())
            return
        updates = self._opened.read_factors()
        for record in self._opened.records:
            update = updates[record.name]
            weight = self._weights.read_weight(record) if self._weights else None
            yield AdaptedWeight(record, update.a, update.b, update.magnitude, weight)
