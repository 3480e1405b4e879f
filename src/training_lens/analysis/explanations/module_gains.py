"""Where an adapter's gain lives, as values: shares of modules, layers, types and rows, and what drops cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training_lens.analyzers.module_groups import OUTSIDE
from training_lens.evaluation.verdict import Interval

UNCHANGED = 0.01  # of the gain: the loss that dropping modules may cost, as `training-lens rank` has it


@dataclass(frozen=True)
class ModuleShare:
    """One module's share of the change of the loss, in nats per supervised token; below 0 it lowers the loss.

    `fraction` is of the whole change; None where that is 0. `interval` is over rows, None with a single row. A module
    that `has_new_rows`, of new tokens, is never dropped.
    """

    name: str
    layer: int | None
    kind: str
    parameters: int
    share: float
    interval: Interval | None
    fraction: float | None
    has_new_rows: bool = False

    @property
    def layer_name(self) -> str:
        """The layer's number, or `outside` for embeddings and the output layer."""
        return OUTSIDE if self.layer is None else str(self.layer)


@dataclass(frozen=True)
class GroupShare:
    """The shares of a group of modules together, as of a layer or a type."""

    name: str
    modules: int
    share: float
    interval: Interval | None
    fraction: float | None


@dataclass(frozen=True)
class RowGroupShare:
    """The change of the loss on a group of rows, by layer and by type of module, in nats per token of these rows."""

    by: str  # domain or length
    name: str
    rows: int
    supervised_tokens: int
    change: float
    interval: Interval | None
    by_layer: Mapping[str, float]
    by_kind: Mapping[str, float]


@dataclass(frozen=True)
class LayerTest:
    """One layer's adapter off, and on alone: measured losses, in nats per supervised token.

    `off` is the loss without this layer's adapter, less that of the whole adapter; `alone` that of the base with only
    this layer's adapter, less the base's. `interaction` is off + alone, the gain that the layer adds to the others less
    the gain that it has alone: above 0 they work together, below 0 others stand in for it.
    """

    name: str
    modules: int
    share: float
    off: float
    off_interval: Interval | None
    alone: float
    alone_interval: Interval | None
    interaction: float


@dataclass(frozen=True)
class DropTest:
    """The loss without the modules of the least gain. `label` is what `--drop` takes; `cost` is against the whole."""

    label: str
    dropped: tuple[str, ...]
    parameters: int  # that are left
    loss: float
    cost: float
    interval: Interval | None


@dataclass(frozen=True)
class ModuleGains:
    """Where the gain lives. Losses are in nats per supervised token, `change` is the adapter's less the base's.

    `residual` is |sum of shares - change| / |change|, at `points` of the quadrature; above `tolerance` the shares are
    inconclusive. `offered` is the label of the largest drop that leaves the loss unchanged, None with a `reason`.
    """

    run: str
    rows: int
    supervised_tokens: int
    confidence: float
    base_loss: float
    loss: float
    change: float
    interval: Interval | None
    points: int
    residual: float
    tolerance: float
    is_complete: bool
    modules: tuple[ModuleShare, ...]
    by_layer: tuple[GroupShare, ...]
    by_kind: tuple[GroupShare, ...]
    by_rows: tuple[RowGroupShare, ...]
    layers: tuple[LayerTest, ...]
    drops: tuple[DropTest, ...]
    offered: str | None
    reason: str
    notes: tuple[str, ...]
    passes: int  # forward
    gradient_passes: int  # forward and backward
    tokens: int  # of the rows, read in every pass

    @property
    def parameters(self) -> int:
        """Of the whole adapter."""
        return sum(module.parameters for module in self.modules)

    def find_drop(self, label: str | None) -> DropTest | None:
        """The drop of a label."""
        return next((drop for drop in self.drops if drop.label == label), None)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "parameters": self.parameters}


def choose_drop(drops: Sequence[DropTest], change: tuple[float, Interval | None]) -> tuple[str | None, str]:
    """The largest drop whose cost is surely below 1 % of the gain, and why it is offered or none is.

    Args:
        change: of the loss from base to adapter, with its interval.
    """
    gain, ends = -change[0], change[1]
    if ends is None or ends[1] >= 0:
        return None, "these rows do not show that the adapter is better than its base, so no smaller one is offered"
    harmless = [drop for drop in drops if drop.interval and drop.interval[1] < UNCHANGED * gain]
    if not harmless:
        return None, f"no drop that was measured surely costs less than {UNCHANGED:.0%} of the gain"
    best = max(harmless, key=lambda drop: len(drop.dropped))
    return best.label, (
        f"without the {best.label} modules of the least gain the loss changes by {best.cost:+.4f}, surely below "
        f"{UNCHANGED:.0%} of the gain"
    )
