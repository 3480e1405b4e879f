"""The lens around a model: any loop drives it, by callbacks, by a context manager, or by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.config.lens_section import LensSection
from training_lens.core.capture import Capture, Gradient, RunFacts
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.modules import adapter_modules
from training_lens.core.probe import Probe
from training_lens.core.registry import CollectorRegistry
from training_lens.core.stacks import Groups
from training_lens.core.taps import GradientTap
from training_lens.errors import LensError
from training_lens.models.quantization import keep_trainable


class TrainingLensFramework:
    """Captures what an adapter does while it trains, in any loop around a PEFT model.

    Ways to join it: `TrainingWrapper` does so by itself; `trainer_callback()` for the HF Trainer and TRL's trainers;
    `watch()` for a loop of your own; or `start`, `gradients`, `record` and `stop`, called by the loop.

    It changes nothing that training reads, so the adapter is the same bit for bit. A collector that fails is switched
    off with a warning, and training goes on; nothing to capture at all is an error before the first step.

    Args:
        folder: where the captures go; `CheckpointAnalyzer(folder)` and `training-lens report FOLDER` read it.
        section: how often and how much; None: the defaults of the config's `lens` section.
        collectors: instances or names; None: those of the section, or all that are known.
        probe: fixed examples for activations and the divergence from the base: a `Probe`, or a batch or rows with
            input_ids and labels; None: neither is captured.

    Raises:
        ConfigurationError: no collector has that name.

    Example:
        lens = TrainingLensFramework("lens")
        with lens.watch(model, optimizer):
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                lens.step(loss)
    """

    def __init__(
        self,
        folder: Path | str,
        section: LensSection | None = None,
        collectors: Sequence[DataCollector | str] | None = None,
        probe: Probe | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder, self.section = Path(folder), section or LensSection()
        chosen = collectors or self.section.collectors or CollectorRegistry.names()
        self.collectors = tuple(CollectorRegistry.get(c)() if isinstance(c, str) else c for c in chosen)
        self.probe = probe if isinstance(probe, Probe) or probe is None else Probe.of_batch(probe)
        self._capture: Capture | None = None
        self._handle: Any = None
        self._opened = self._updated = self._recorded = 0  # the last step whose gradients, update, loss were seen
        self._waiting: dict[int, Mapping[str, Any]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far, by collector and by what serves them all.

        On a GPU that of this thread: what it queues there runs beside the step.
        """
        return dict(self._capture.seconds) if self._capture else {}

    def start(self, model: Any, optimizer: torch.optim.Optimizer | None = None, facts: RunFacts | None = None) -> None:
        """Before the first step. Each step of `optimizer` is then a moment of update.

        Raises:
            LensError: no module to watch, or the folder cannot be written.
        """
        facts, modules = facts or RunFacts(), adapter_modules(keep_trainable(model))
        probe = self.probe.to(modules[0].a.device) if self.probe else None
        watched = Watched(model, modules, Groups(modules), optimizer, probe, facts.total_steps)
        self._capture = Capture(self.folder, self.section, self.collectors, watched, facts)
        self._handle = optimizer.register_step_post_hook(self._after_update) if optimizer else None
        self._opened = self._updated = self._recorded = facts.after_step

    def wants(self, step: int) -> bool:
        """Whether gradients of this step are looked at."""
        return self._capture is not None and self._capture.due(step)

    def gradients(self, step: int, of: Gradient = lambda parameter: parameter.grad) -> None:
        """The gradients of a whole step are there: accumulated, unscaled, before clipping.

        Args:
            step: counted from 1.
            of: gives a parameter's gradient.
        """
        self._opened = step
        if self._capture:
            self._capture.gradients(step, of)

    def record(self, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        """The step is over: its loss, and what else is known of it (the columns of `tables.MEASURES["loss"]`)."""
        if self._capture:
            self._capture.record(step, values)

    def evaluation(self, step: int, loss: float, *, base: bool = False) -> None:
        """A validation gave this loss, in nats per supervised token; `base`: that of the base."""
        if self._capture:
            self._capture.evaluation(step, loss, base)

    def stop(self, *, failed: bool = False) -> None:
        """After the last step: what comes at intervals once more, if the run ended well; all goes to disk."""
        if self._capture:
            self._capture.stop(failed)
        if self._handle:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def watch(
        self, model: Any, optimizer: torch.optim.Optimizer, *, scaler: Any = None, facts: RunFacts | None = None
    ) -> Iterator[TrainingLensFramework]:
        """Within the block, every step of the optimizer is captured; call `step(loss)` once for each.

        Args:
            scaler: the loop's GradScaler, where it has one.

        Raises:
            LensError: no module to watch; at the end: the optimizer never stepped, so nothing was captured.
        """
        self.start(model, optimizer, facts)
        tap, handles = self.tap(scaler), []
        handles.append(optimizer.register_step_pre_hook(lambda *_: self.gradients(self._updated + 1, tap)))
        handles.append(optimizer.register_step_post_hook(lambda *_: tap.clear()))
        failed = True
        try:
            yield self
            failed = False
        finally:
            for handle in handles:
                handle.remove()
            tap.remove()
            self.stop(failed=failed)
        if self._updated == 0:
            raise LensError(
                "the lens captured no step: the optimizer that it watches never stepped. Give watch() the optimizer "
                "that your loop steps."
            )

    def step(self, loss: Tensor | float, **values: float | Tensor) -> None:
        """In a loop of your own: this step's loss, before or after `optimizer.step()`; `values` such as lr=1e-4."""
        self._recorded += 1
        self._waiting[self._recorded] = {"loss": loss, **values}
        self._record_waiting()

    def tap(self, scaler: Any = None) -> GradientTap:
        """Hooks that keep the gradients of what is watched as they are before clipping; see `GradientTap`."""
        assert self._capture is not None, "start() comes first"
        trained = [p for module in self._capture.watched.modules for p in module.parameters]
        return GradientTap(trained, scaler.get_scale if scaler is not None and scaler.is_enabled() else None)

    def trainer_callback(self) -> Any:
        """A `TrainerCallback` for the HF Trainer, TRL's SFTTrainer and other trainers built on it."""
        from training_lens.core.trainer_callback import trainer_callback

        return trainer_callback(self)

    def _after_update(self, *_: Any) -> None:
        self._updated = self._opened
        if self._capture:
            self._capture.update(self._updated)
        self._record_waiting()

    def _record_waiting(self) -> None:
        """The losses of steps whose update is done: the probe comes after it."""
        for step in [step for step in self._waiting if step <= self._updated]:
            self.record(step, self._waiting.pop(step))
