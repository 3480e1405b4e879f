"""The lens around a model. A loop drives it by callbacks, by a context manager, or by direct calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.config.lens_section import LensSection
from training_lens.core.capture import Capture, RunFacts
from training_lens.core.collector import CaptureContext, CollectorRegistry, DataCollector
from training_lens.core.gradient_hooks import GradientHooks
from training_lens.core.lens_store import RunningCaptures
from training_lens.core.modules import AdapterModule, GradientGetter, ModuleBatches, adapter_modules
from training_lens.core.probe import Probe
from training_lens.core.row_losses import RowLosses
from training_lens.core.table_names import HELD_OUT_LOSSES, ROW_LOSSES
from training_lens.core.trainer_callback import build_trainer_callback
from training_lens.errors import LensError
from training_lens.models.quantization import keep_trainable
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


class TrainingLensFramework:
    """Captures what an adapter does while it trains, in any loop around a PEFT model.

    Ways to use it: `TrainingWrapper` uses it by itself; `trainer_callback()` is for the HF Trainer and TRL's trainers;
    `watch()` is for your own loop; or call `start`, `capture_gradients`, `record_step` and `stop` directly.

    It changes nothing that training reads: the adapter is the same bit for bit. A collector that fails is switched off
    with a warning, and training continues. A model with nothing to capture is an error before the first step.

    Args:
        folder: where the captures go; `CheckpointAnalyzer(folder)` and `training-lens report FOLDER` read it.
        section: how often to capture, and how much to keep; None: the defaults of the config's `lens` section.
        collectors: instances or names; None: those of the section, or all registered ones.
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
        self.probe = probe if isinstance(probe, Probe) or probe is None else Probe.from_batch(probe)
        self._capture: Capture | None = None
        self._update_hook: Any = None
        self._gradient_step = self._update_step = self._loss_step = 0  # the last step of which each was seen
        self._pending_values: Mapping[str, Any] | None = None  # a loss that came before its update
        self._dropped_losses = 0  # losses without an update
        self._scaler: Any = None
        self._scale = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far by name: collectors, and what serves them all.

        On a GPU it is this thread's time; kernels that it queues run alongside the step.
        """
        return dict(self._capture.seconds) if self._capture else {}

    def count_seconds(self, name: str, seconds: float) -> None:
        """Count time that was spent for the lens outside of it, under a name of its own."""
        if self._capture:
            self._capture.seconds[name] = self._capture.seconds.get(name, 0.0) + seconds

    def start(self, model: Any, optimizer: torch.optim.Optimizer | None = None, facts: RunFacts | None = None) -> None:
        """Call it before the first step. Every step of `optimizer` is then captured as an update.

        Raises:
            LensError: no module to capture, or the folder cannot be written.
        """
        if self._update_hook:
            self.stop(failed=True)  # an earlier run ended without stop()
        facts, modules = facts or RunFacts(), adapter_modules(keep_trainable(model))
        probe = self.probe.move_to(modules[0].a.device) if self.probe else None
        context = CaptureContext(model, modules, ModuleBatches(modules), optimizer, probe, facts.total_steps)
        self._capture = Capture(self.folder, self.section, self.collectors, context, facts)
        self._update_hook = optimizer.register_step_post_hook(self._capture_update) if optimizer else None
        self._gradient_step = self._update_step = self._loss_step = facts.after_step
        self._pending_values, self._dropped_losses = None, 0

    def is_due(self, step: int) -> bool:
        """Whether this step's gradients or update are captured."""
        return self._capture is not None and self._capture.is_due(step)

    def capture_gradients(self, step: int, gradient_of: GradientGetter = lambda parameter: parameter.grad) -> None:
        """Call it when the whole step's gradients are there: accumulated, unscaled, before clipping.

        Args:
            step: counted from 1.
            gradient_of: gives a parameter's gradient.
        """
        self._gradient_step = step
        if self._capture:
            self._capture.capture_gradients(step, gradient_of)

    def capture_failed_step(self) -> None:
        """Capture the gradients of a step that failed before its update, also where none are due.

        They show which module broke.
        """
        if self._capture and self._gradient_step > self._update_step:
            self._capture.capture_gradients(self._gradient_step, lambda parameter: parameter.grad, is_failed=True)

    def record_step(self, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        """End a step with its loss and other values (the columns of `tables.MEASURES["loss"]`)."""
        self._loss_step = step
        if self._capture:
            self._capture.record_step(step, values)

    def record_rows(self, step: int, rows: RowLosses, *, held_out: bool = False) -> None:
        """Store the losses of a step's training rows, where `lens.row_losses_megabytes` has room. Call it before
        `record_step`. Cost: microseconds for each row, and no wait for the device.

        Args:
            held_out: they are validation rows, as they are after the step.
        """
        if self._capture:
            self._capture.record_rows(step, rows, HELD_OUT_LOSSES if held_out else ROW_LOSSES)

    def record_evaluation(
        self, step: int, loss: float | None, *, base: bool = False, sample: Mapping[str, float | None] | None = None
    ) -> None:
        """Store a validation loss in nats per supervised token.

        Args:
            base: it is the base model's.
            sample: `sample_loss` of a fixed sample of the rows, and its `sample_error`, where they are validated more
                often than all rows; `loss` is then None in between.
        """
        if self._capture:
            self._capture.record_evaluation(step, {"base_loss" if base else "loss": loss, **(sample or {})})

    def open_captures(self) -> RunningCaptures:
        """The captures so far, for reading while this process trains; call their `refresh` to see later ones.

        Raises:
            LensError: there are none yet.
        """
        return RunningCaptures(self.folder, lambda: self._capture.pending_tables() if self._capture else {})

    def flush(self) -> None:
        """Write all captures to disk. Call it before a checkpoint, so that a run resumed from it has no gap."""
        if self._capture:
            self._capture.flush()

    def stop(self, *, failed: bool = False) -> None:
        """Call it after the last step: captures it once more where it was not due, unless `failed`, and flushes."""
        if self._capture:
            self._capture.stop(failed)
        if self._update_hook:
            self._update_hook.remove()
            self._update_hook = None

    @contextmanager
    def watch(
        self, model: Any, optimizer: torch.optim.Optimizer, *, scaler: Any = None, facts: RunFacts | None = None
    ) -> Iterator[TrainingLensFramework]:
        """Within the block, every optimizer step is captured; call `step(loss)` once for each.

        Args:
            optimizer: with several, the one that your loop steps first.
            scaler: the loop's GradScaler, if any: it scales gradients, and skips updates.

        Raises:
            LensError: no module to capture, or none of its parameters is in the optimizer; at the end: the optimizer
                never stepped, so nothing was captured.
        """
        _require_optimized(adapter_modules(model), optimizer)
        self.start(model, optimizer, facts)
        first_step, self._scaler = self._update_step, scaler if scaler is not None and scaler.is_enabled() else None
        self._scale = self._scaler.get_scale() if self._scaler else 0.0
        gradients = self.register_gradient_hooks(scaler)
        handles = [
            optimizer.register_step_pre_hook(partial(self._capture_before_update, gradients)),
            optimizer.register_step_post_hook(lambda *_: gradients.clear()),
        ]
        failed = True
        try:
            yield self
            failed = False
        finally:
            for handle in handles:
                handle.remove()
            gradients.remove()
            self._close_step()
            self.stop(failed=failed)
        if self._update_step == first_step:
            raise LensError(
                "the lens captured no step: the optimizer given to watch() never stepped. Give watch() the optimizer "
                "that your loop steps."
            )
        if self._dropped_losses:
            logger.warning(
                "the lens left out %d losses that no update followed: call step(loss) once for each optimizer.step(), "
                "and give a GradScaler to watch().",
                self._dropped_losses,
            )

    def step(self, loss: Tensor | float, **values: float | Tensor) -> None:
        """In your own loop: this step's loss, before or after `optimizer.step()`; `values` such as lr=1e-4."""
        before, self._scale = self._scale, self._scaler.get_scale() if self._scaler else 0.0
        if self._scale < before:  # the scaler met a gradient that is not finite, and skipped the update
            if self._pending_values is None:
                return  # this loss belongs to it
            self._pending_values = None
        all_values = {"loss": loss, **values}
        if self._update_step > self._loss_step:
            self.record_step(self._update_step, all_values)
            return
        self._dropped_losses += self._pending_values is not None
        self._pending_values = all_values

    def _capture_before_update(
        self, gradients: GradientHooks, _optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The optimizer's pre-hook. With a closure it returns new arguments, as gradients exist only inside of it."""
        self._close_step()
        closure = next(iter([*args[1:], *kwargs.values()]), None)  # args[0] is the optimizer
        if closure is None:
            self.capture_gradients(self._update_step + 1, gradients)
            return None

        def capture_after_closure() -> Any:
            loss = closure()
            if self._gradient_step == self._update_step:  # its first call: gradients of the weights before the update
                self.capture_gradients(self._update_step + 1, gradients)
            return loss

        return (args[0], capture_after_closure), {}

    def _close_step(self) -> None:
        """End a step that got no loss."""
        if self._loss_step < self._update_step:
            self.record_step(self._update_step, {})

    def register_gradient_hooks(self, scaler: Any = None) -> GradientHooks:
        """Hooks that copy the adapter's gradients before clipping; see `GradientHooks`."""
        assert self._capture is not None, "start() comes first"
        trained = [p for module in self._capture.context.modules for p in module.trained_parameters]
        return GradientHooks(trained, scaler.get_scale if scaler is not None and scaler.is_enabled() else None)

    def trainer_callback(self) -> Any:
        """A `TrainerCallback` for the HF Trainer, TRL's SFTTrainer and other trainers built on it."""
        return build_trainer_callback(self)

    def _capture_update(self, *_: Any) -> None:
        self._update_step = self._gradient_step
        if self._capture:
            self._capture.capture_update(self._update_step)
        if self._pending_values is not None:  # the probe runs after the update, so the step could not end before
            values, self._pending_values = self._pending_values, None
            self.record_step(self._update_step, values)


def _require_optimized(modules: Sequence[AdapterModule], optimizer: torch.optim.Optimizer) -> None:
    """Raise LensError if the optimizer has none of the modules' trained parameters; warn if some are missing."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for module in modules for p in module.trained_parameters if p.requires_grad]
    missing = sum(id(p) not in stepped for p in trained)
    if trained and missing == len(trained):
        raise LensError(
            f"none of the adapter's {missing} trained parameters is in the {type(optimizer).__name__} given to "
            "watch(), so the lens would capture none of its steps. Give it the optimizer that your loop steps."
        )
    if missing:
        logger.warning(
            "%d of the adapter's %d trained parameters are not in the %s that the lens watches: norm_step misses the "
            "updates that another optimizer makes to them.",
            *(missing, len(trained), type(optimizer).__name__),
        )
