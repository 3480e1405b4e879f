"""How evenly a mixture's routers use its experts, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_lens.analyzers.module_groups import latest_values
from training_lens.core import table_names as tables
from training_lens.core.collector import AnalyzerRegistry
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.types import DataType


@AnalyzerRegistry.register
class RouterLoadAnalyzer(DataAnalyzer):
    """The experts' shares of the probe's tokens at the last probe, and how even they are.

    Gives `step`, and `layers`: of each module of experts its `share` and `base_share` by expert, `effective` and
    `base_effective` (exp of the entropy of the shares: as many experts, used evenly, would be as even), and `unused`,
    the experts without a token.
    """

    name = "router_load"
    needs = frozenset[DataType]()
    gives = ("step", "layers")

    def can_read(self, recording: Recording) -> bool:
        """Whether the routing was captured."""
        return recording.has(tables.ROUTER_LOAD)

    def analyze(self, recording: Recording) -> Mapping[str, Any]:
        share = recording.series(tables.ROUTER_LOAD, "share")
        now, base = latest_values(share), latest_values(recording.series(tables.ROUTER_LOAD, "base_share"))
        layers: dict[str, dict[str, Any]] = {}
        for name in share.names:
            own = layers.setdefault(name.partition("[")[0], {"share": [], "base_share": []})
            own["share"].append(now[name])
            own["base_share"].append(base[name])
        for own in layers.values():
            own["effective"], own["base_effective"] = (
                effective_experts(own["share"]),
                effective_experts(own["base_share"]),
            )
            own["unused"] = [expert for expert, part in enumerate(own["share"]) if not part]
        return {"step": int(share.steps[-1]) if len(share.steps) else None, "layers": layers}


def effective_experts(shares: list[float | None]) -> float:
    """exp(-sum p ln p) of shares p that sum to 1: all experts if they are used evenly, 1 if one gets every token."""
    known = np.array([share for share in shares if share], dtype=np.float64)
    return float(np.exp(-(known * np.log(known)).sum()))
