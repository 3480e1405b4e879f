"""How a mixture's routers share the tokens of the probe set out among the experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training_lens.core import table_names as tables
from training_lens.core.collector import CaptureContext, CollectorRegistry, DataCollector
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.models.experts import Routing, count_routed, expert_modules, expert_name, watch_routing


@CollectorRegistry.register
class RouterLoadCollector(DataCollector):
    """The share of the probe's tokens that each expert gets, with the adapter and without (table `router_load`).

    A token counts once for each of its experts, so the shares of a layer sum to 1. Padding does not count. Nothing is
    captured of a base without experts in one parameter, or where they do not get the router's choice as an argument
    (Llama 4).

    Cost: a count of small integers in each layer, no synchronisation.
    """

    name, data_type = tables.ROUTER_LOAD, DataType.ACTIVATIONS
    moment, cadence = Moment.PROBE, Cadence.PROBE

    def applies_to(self, context: CaptureContext) -> bool:
        """Only to a mixture."""
        return bool(expert_modules(context.model))

    @contextmanager
    def probe_hooks(self, context: CaptureContext) -> Iterator[None]:
        """Count in the passes with the adapter off and on."""
        self._counts: dict[tuple[str, bool], Tensor] = {}  # by module of experts and whether the adapter is off
        layer: Any = context.modules[0].module
        mask = context.probe.attention_mask.flatten() if context.probe else torch.empty(0)

        def count(path: str, routing: Routing, _output: Any) -> None:
            is_whole = len(routing.chosen) == len(mask)
            counted = mask.to(routing.chosen.device)[:, None].expand_as(routing.chosen) if is_whole else None
            key, found = (path, bool(layer.disable_adapters)), count_routed(routing, counted)
            self._counts[key] = self._counts[key] + found if key in self._counts else found

        with watch_routing(context.model, count):
            yield

    def collect(self, context: CaptureContext, step: int) -> Captured | None:
        """The shares of all experts of all layers."""
        with_adapter = {path: _share(counts) for (path, is_off), counts in self._counts.items() if not is_off}
        if not with_adapter:
            return None
        base = [_share(self._counts.get((path, True), self._counts[path, False])) for path in with_adapter]
        rows = [expert_name(path, e) for path, shares in with_adapter.items() for e in range(len(shares))]
        return Captured({"share": torch.cat(list(with_adapter.values())), "base_share": torch.cat(base)}, rows=rows)


def _share(counts: Tensor) -> Tensor:
    return counts / counts.sum()
