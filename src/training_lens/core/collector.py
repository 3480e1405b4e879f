"""What a collector is, and what it gets to see; the known collectors and analyzers, built-in ones and users' own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar

import torch

from training_lens.core.modules import AdapterModule, ModuleBatches
from training_lens.core.probe import Probe
from training_lens.core.recording import DataAnalyzer
from training_lens.core.types import Cadence, Captured, DataType, Moment
from training_lens.errors import ConfigurationError
from training_lens.measures.factors import Factors
from training_lens.models.token_scores import PairedScores
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
C = TypeVar("C", bound="type[DataCollector] | type[DataAnalyzer]")
T = TypeVar("T")


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

    def applies_to(self, context: CaptureContext) -> bool:
        """Whether there is anything to capture of this model; a table that does not apply is not announced."""
        return True

    def start(self, context: CaptureContext) -> Captured | None:
        """Before the first step. What holds for the whole run may be returned here; it is stored as step 0."""
        return None

    @abstractmethod
    def collect(self, context: CaptureContext, step: int) -> Captured | None:
        """Measure one step; None where there is nothing."""

    def probe_hooks(self, context: CaptureContext) -> AbstractContextManager[Any]:
        """A context around the probe's forward passes, for hooks on modules; used at the moment of the probe alone."""
        return nullcontext()


class _Registry(Generic[T]):
    """Classes by their `name`. Users add theirs by the decorator `register`, or by an entry point of their package.

    The built-in ones are in a higher layer, so they are imported by their package's name, too.
    """

    group: ClassVar[str]
    built_in: ClassVar[str]
    _classes: ClassVar[dict[str, type]]
    _is_loaded: ClassVar[bool]

    @classmethod
    def register(cls, new: C) -> C:
        """Decorator: register a class under its `name`.

        Raises:
            ConfigurationError: another class has the name.
        """
        known = cls._classes.get(new.name)
        if known is not None and known.__qualname__ != new.__qualname__:
            raise ConfigurationError(
                f"{cls.__name__}: '{new.name}' is {known.__module__}.{known.__qualname__} already. "
                f"Give {new.__module__}.{new.__qualname__} another name."
            )
        cls._classes[new.name] = new
        return new

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All registered names."""
        cls._load_all()
        return tuple(cls._classes)

    @classmethod
    def get(cls, name: str) -> type[T]:
        """The class with a name.

        Raises:
            ConfigurationError: there is none; names the known ones.
        """
        cls._load_all()
        if name not in cls._classes:
            hint = did_you_mean(name, sorted(cls._classes))
            raise ConfigurationError(
                f"{cls.__name__}: there is no '{name}'.{hint} There are: {', '.join(sorted(cls._classes))}. "
                f"A package adds its own by an entry point of the group '{cls.group}'."
            )
        return cls._classes[name]

    @classmethod
    def _load_all(cls) -> None:
        if cls._is_loaded:
            return
        cls._is_loaded = True
        import_module(cls.built_in)
        for point in entry_points(group=cls.group):
            try:
                cls.register(point.load())
            except Exception as error:  # another package's fault must not end the run
                logger.warning("%s of '%s' cannot be used: %s", cls.__name__, point.value, error)


class CollectorRegistry(_Registry[DataCollector]):
    """The collectors; entry points of the group `training_lens.collectors` add to them."""

    group, built_in = "training_lens.collectors", "training_lens.collectors"
    _classes, _is_loaded = {}, False


class AnalyzerRegistry(_Registry[DataAnalyzer]):
    """The analyzers; entry points of the group `training_lens.analyzers` add to them."""

    group, built_in = "training_lens.analyzers", "training_lens.analyzers"
    _classes, _is_loaded = {}, False
