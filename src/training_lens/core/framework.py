"""The lens around a model: any loop drives it, by callbacks, by a context manager, or by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.config.lens_section import LensSection
from training_lens.core.capture import Capture, Gradient, RunFacts
from training_lens.core.collector import DataCollector, Watched
from training_lens.core.gradient_hooks import GradientTap
from training_lens.core.module_batches import Groups
from training_lens.core.modules import AdapterModule, adapter_modules
from training_lens.core.probe import Probe
from training_lens.core.registry import CollectorRegistry
from training_lens.errors import LensError
from training_lens.models.quantization import keep_trainable
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


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
        self._waiting: Mapping[str, Any] | None = None  # a loss that was given before its update
        self._left_out = 0  # losses without an update
        self._scaler: Any = None
        self._scale = 0.0

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
        if self._handle:
            self.stop(failed=True)  # a run that broke off without a word
        facts, modules = facts or RunFacts(), adapter_modules(keep_trainable(model))
        probe = self.probe.to(modules[0].a.device) if self.probe else None
        watched = Watched(model, modules, Groups(modules), optimizer, probe, facts.total_steps)
        self._capture = Capture(self.folder, self.section, self.collectors, watched, facts)
        self._handle = optimizer.register_step_post_hook(self._after_update) if optimizer else None
        self._opened = self._updated = self._recorded = facts.after_step
        self._waiting, self._left_out = None, 0

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

    def break_off(self) -> None:
        """The step fails between its gradients and its update, and its gradients still stand: they are captured.

        So that they tell which module broke, also at a step that the pace passes over.
        """
        if self._capture and self._opened > self._updated:
            self._capture.gradients(self._opened, lambda parameter: parameter.grad, passed_over=True)

    def record(self, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        """The step is over: its loss, and what else is known of it (the columns of `tables.MEASURES["loss"]`)."""
        self._recorded = step
        if self._capture:
            self._capture.record(step, values)

    def evaluation(self, step: int, loss: float, *, base: bool = False) -> None:
        """A validation gave this loss, in nats per supervised token; `base`: that of the base."""
        if self._capture:
            self._capture.evaluation(step, loss, base)

    def flush(self) -> None:
        """All that was captured goes to disk: before a checkpoint, so that a run that goes on from it has no gap."""
        if self._capture:
            self._capture.flush()

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
            optimizer: of several, the one that your loop steps first.
            scaler: the loop's GradScaler, where it has one: it multiplies gradients, and leaves out updates.

        Raises:
            LensError: no module to watch, or no parameter of them in the optimizer; at the end: the optimizer never
                stepped, so nothing was captured.
        """
        _require_stepped(adapter_modules(model), optimizer)
        self.start(model, optimizer, facts)
        first, self._scaler = self._updated, scaler if scaler is not None and scaler.is_enabled() else None
        self._scale = self._scaler.get_scale() if self._scaler else 0.0
        tap = self.tap(scaler)
        handles = [
            optimizer.register_step_pre_hook(partial(self._before_update, tap)),
            optimizer.register_step_post_hook(lambda *_: tap.clear()),
        ]
        failed = True
        try:
            yield self
            failed = False
        finally:
            for handle in handles:
                handle.remove()
            tap.remove()
            self._close_step()
            self.stop(failed=failed)
        if self._updated == first:
            raise LensError(
                "the lens captured no step: the optimizer that it watches never stepped. Give watch() the optimizer "
                "that your loop steps."
            )
        if self._left_out:
            logger.warning(
                "the lens left out %d losses that no update followed: call step(loss) once for each optimizer.step(), "
                "and give a GradScaler to watch().",
                self._left_out,
            )

    def step(self, loss: Tensor | float, **values: float | Tensor) -> None:
        """In a loop of your own: this step's loss, before or after `optimizer.step()`; `values` such as lr=1e-4."""
        if self._update_left_out():
            if self._waiting is None:
                return  # it is of that update
            self._waiting = None
        given = {"loss": loss, **values}
        if self._updated > self._recorded:
            self.record(self._updated, given)
            return
        self._left_out += self._waiting is not None
        self._waiting = given

    def _update_left_out(self) -> bool:
        """Whether the scaler has met a gradient that is not finite since this was asked: then it lowers its scale."""
        before, self._scale = self._scale, self._scaler.get_scale() if self._scaler else 0.0
        return bool(self._scale < before)

    def _before_update(
        self, tap: GradientTap, _optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the optimizer's step is to be called with instead: a closure makes its gradients only within."""
        self._close_step()
        given = [*args[1:], *kwargs.values()]  # args[0] is the optimizer
        if not given or given[0] is None:
            self.gradients(self._updated + 1, tap)
            return None
        return (args[0], self._looking(tap, given[0])), {}

    def _looking(self, tap: GradientTap, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure; after its first call the gradients are those of the weights before the update."""

        def look() -> Any:
            loss = closure()
            if self._opened == self._updated:
                self.gradients(self._updated + 1, tap)
            return loss

        return look

    def _close_step(self) -> None:
        """The update before got no loss: what comes at the end of a step comes all the same."""
        if self._recorded < self._updated:
            self.record(self._updated, {})

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
        if self._waiting is not None:  # only now: the probe comes after the update
            waiting, self._waiting = self._waiting, None
            self.record(self._updated, waiting)


def _require_stepped(modules: Sequence[AdapterModule], optimizer: torch.optim.Optimizer) -> None:
    """Raises LensError where the optimizer has none of what trains of the modules; warns where it has not all."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for module in modules for p in module.parameters if p.requires_grad]
    missing = sum(id(p) not in stepped for p in trained)
    if trained and missing == len(trained):
        raise LensError(
            f"none of the adapter's {missing} trained parameters is in the {type(optimizer).__name__} given to "
            "watch(), so the lens would capture none of its steps. Give it the optimizer that your loop steps."
        )
    if missing:
        logger.warning(
            "%d of the adapter's %d trained parameters are not in the %s that the lens watches: the step that another "
            "optimizer takes of them is not in norm_step.",
            *(missing, len(trained), type(optimizer).__name__),
        )
