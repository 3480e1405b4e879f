"""What the lens captures, as values: kinds of data, moments of a step, and what one collector saw at one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from torch import Tensor

RUN = "run"  # the row of what belongs to the whole run and not to a module


class DataType(StrEnum):
    """What a table is about; `training-lens export --data-type` takes these."""

    ADAPTER_WEIGHTS = "adapter_weights"
    ADAPTER_GRADIENTS = "adapter_gradients"
    LORA_ACTIVATIONS = "lora_activations"
    ACTIVATIONS = "activations"
    OPTIMIZER_STATE = "optimizer_state"
    LOSS = "loss"


class Moment(StrEnum):
    """When a collector looks.

    gradients: those of the whole step stand, accumulated, unscaled, before clipping; weights are those before it.
    update: the optimizer has just stepped; its state and the weights are new, gradients are as it took them.
    probe: after an update, the probe set goes through the model, with the adapter off and on.
    """

    GRADIENTS = "gradients"
    UPDATE = "update"
    PROBE = "probe"


class Cadence(StrEnum):
    """Which key of the config says how often: lens.scalars_every, spectra_every, probe_every or snapshot_every.

    Collectors of one cadence share its pace, and its share of the training time.
    """

    SCALARS = "scalars"
    SPECTRA = "spectra"
    PROBE = "probe"
    SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Captured:
    """What one collector saw at one step. Tensors stay on their device: nothing here waits for it.

    `scalars` and `vectors` are by measure, an entry for each of `rows`; `vectors` may differ in length. `tensors` are
    kept as a snapshot, by name.
    """

    scalars: Mapping[str, Tensor] = field(default_factory=dict)  # measure -> (rows,) float
    vectors: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)  # measure -> rows of (any,)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Sequence[str] = (RUN,)


@dataclass(frozen=True)
class ModuleRecord:
    """An adapted module, as lens.json keeps it. W is its frozen weight, dW = `scaling` B A what the adapter adds.

    `name` is its path in the base model, with `#adapter` behind it where several adapters are watched. `layer` is the
    number of its decoder layer and `kind` what it is there (q, k, v, o, gate, up, down, or its own name). `variant` is
    lora, dora or pissa; of pissa, `rank` is that of the trained half, and dW has twice that.
    """

    name: str
    layer: int | None
    kind: str
    rank: int
    in_features: int
    out_features: int
    scaling: float
    variant: str = "lora"
    adapter: str = "default"


@dataclass(frozen=True)
class LensManifest:
    """What lens.json holds: what the tables in the folder are about.

    `origin` is the loop that was watched: training-lens, transformers, or hand. `tables` gives each table's data type.
    `settings` are those of the run that readings need, where they are known: `total_steps`, `steps_per_epoch`,
    `max_grad_norm`, `lr`, `processes`. `probe` says what the probe set is: examples, tokens, supervised tokens.
    """

    modules: tuple[ModuleRecord, ...]
    origin: str = "training-lens"
    tables: Mapping[str, DataType] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, int] | None = None
    format: int = 1


@dataclass(frozen=True)
class Series:
    """One measure over time: `values[i, j]` is that of `names[j]` after step `steps[i]`; NaN where there is none."""

    steps: np.ndarray  # (steps,) int64, ascending
    names: tuple[str, ...]
    values: np.ndarray  # (steps, names) float64

    @classmethod
    def empty(cls) -> Series:
        """Of what was never taken."""
        return cls(np.zeros(0, np.int64), (), np.zeros((0, 0)))

    def column(self, name: str) -> np.ndarray:
        """(steps,): the values of one name."""
        column: np.ndarray = self.values[:, self.names.index(name)]
        return column
