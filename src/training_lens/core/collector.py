"""What a collector is, and what it gets to see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from training_lens.core.modules import AdapterModule, ModuleBatches
from training_lens.core.probe import Probe
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.measures.factors import Factors
from training_lens.models.token_scores import PairedScores


@dataclass
class CaptureContext:
    """The model and the step that collectors look at. They must not change any of it.

    `before`, `gradients` and `after` hold the factors of each of `batches`: the weights that the step's gradients
    belong to, these gradients (accumulated, unscaled, before clipping), and the weights after the update. At the moment
    of gradients `after` is empty. At the probe the model has its updated weights, and `scores` are those of the probe's
    supervised tokens without and with the adapter. `one_pass`: the adapter adds nothing yet, so one forward pass with
    the adapter on serves as both.
    """

    model: Any
    modules: tuple[AdapterModule, ...]
    batches: ModuleBatches
    optimizer: torch.optim.Optimizer | None = None
    probe: Probe | None = None
    total_steps: int | None = None
    before: Sequence[Factors] = field(default_factory=tuple)
    gradients: Sequence[Factors] = field(default_factory=tuple)
    after: Sequence[Factors] = field(default_factory=tuple)
    scores: PairedScores | None = None
    one_pass: bool = False

    @property
    def module_names(self) -> list[str]:
        """In the model's order: the rows of what is measured for each module."""
        return [module.name for module in self.modules]


class DataCollector(ABC):
    """Captures one table. Override `collect`; class attributes set the data type, the moment and the cadence.

    A collector must not change what training reads: parameters, gradients, torch's random state. It should return
    tensors on their device, as `.item()` and `.cpu()` wait for it. Its seconds count as the lens's cost.

    Example:
        @CollectorRegistry.register
        class Sparsity(DataCollector):
            name, data_type, moment = "sparsity", DataType.ADAPTER_GRADIENTS, Moment.GRADIENTS

            def collect(self, context: CaptureContext, step: int) -> Captured:
                zeros = [(factors.b == 0).float().mean((1, 2)) for factors in context.gradients]
                return Captured({"zero_share": context.batches.restore_order(zeros)}, rows=context.module_names)
    """

    name: ClassVar[str]
    data_type: ClassVar[DataType]
    moment: ClassVar[Moment] = Moment.UPDATE
    cadence: ClassVar[Cadence] = Cadence.SCALARS

    def start(self, context: CaptureContext) -> Captured | None:
        """Before the first step. What holds for the whole run may be returned here; it is stored as step 0."""
        return None

    @abstractmethod
    def collect(self, context: CaptureContext, step: int) -> Captured | None:
        """Measure one step; None where there is nothing."""

    def probe_hooks(self, context: CaptureContext) -> AbstractContextManager[Any]:
        """A context around the probe's forward passes, for hooks on modules; used at the moment of the probe alone."""
        return nullcontext()
