"""The lens's values: data types, moments of a step, and what one collector captured at one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from torch import Tensor

RUN = "run"  # the row for measures of the whole run


class DataType(StrEnum):
    """What a table is about; `training-lens export --data-type` takes these."""

    ADAPTER_WEIGHTS = "adapter_weights"
    ADAPTER_GRADIENTS = "adapter_gradients"
    LORA_ACTIVATIONS = "lora_activations"
    ACTIVATIONS = "activations"
    OPTIMIZER_STATE = "optimizer_state"
    LOSS = "loss"
    ROW_LOSSES = "row_losses"


class Moment(StrEnum):
    """When a collector runs.

    gradients: the whole step's gradients are there: accumulated, unscaled, before clipping; weights are the old ones.
    update: the optimizer has just stepped; its state and the weights are new, gradients are those that it took.
    probe: after an update, the model computes the probe set with the adapter off and on.
    """

    GRADIENTS = "gradients"
    UPDATE = "update"
    PROBE = "probe"


class Cadence(StrEnum):
    """Which config key sets how often: lens.scalars_every, spectra_every, probe_every or snapshot_every.

    Collectors of one cadence have one schedule and one share of the training time.
    """

    SCALARS = "scalars"
    SPECTRA = "spectra"
    PROBE = "probe"
    SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Captured:
    """What one collector measured at one step. Tensors stay on their device, without waiting for it.

    `scalars` and `vectors` are by measure, with an entry for each of `rows`; `vectors` may differ in length. `tensors`
    are stored as a snapshot, by name.
    """

    scalars: Mapping[str, Tensor] = field(default_factory=dict)  # measure -> (rows,) float
    vectors: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)  # measure -> rows of (any,)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Sequence[str] = (RUN,)


@dataclass(frozen=True)
class ModuleRecord:
    """An adapted module, as stored in lens.json. W is its frozen weight, dW = `scaling` B A what the adapter adds.

    `name` is its path in the base model, followed by `#adapter` if several adapters are captured. `layer` is the
    index of its decoder layer and `kind` its role there (q, k, v, o, gate, up, down, or its own name). `variant` is
    lora, dora or pissa; with pissa, `rank` is the trained half's, and dW has twice that rank.
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
    """The contents of lens.json.

    `origin` is the training loop: training-lens, transformers, or hand. `tables` gives each table's data type.
    `settings` are the run's settings that analyzers need, where known: `total_steps`, `steps_per_epoch`,
    `max_grad_norm`, `lr`, `processes`, `train_examples`, `distinct_examples` of an epoch, `visits_per_epoch` of such an
    example, `sample_rows` of the validation sample, `frozen`, the factors that do not require gradients (`module.A`),
    and `row_losses_every` and `held_out_row_losses_every`: the losses of one row in so many are recorded, 0: of none.
    `probe` has the probe set's examples, tokens and supervised tokens.
    """

    modules: tuple[ModuleRecord, ...]
    origin: str = "training-lens"
    tables: Mapping[str, DataType] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, int] | None = None
    format: int = 1


@dataclass(frozen=True)
class Series:
    """One measure over time: `values[i, j]` belongs to `names[j]` after step `steps[i]`; NaN if it is missing."""

    steps: np.ndarray  # (steps,) int64, ascending
    names: tuple[str, ...]
    values: np.ndarray  # (steps, names) float64

    @classmethod
    def empty(cls) -> Series:
        """A series without steps and names."""
        return cls(np.zeros(0, np.int64), (), np.zeros((0, 0)))

    def column(self, name: str) -> np.ndarray:
        """(steps,): the values of one name."""
        column: np.ndarray = self.values[:, self.names.index(name)]
        return column
