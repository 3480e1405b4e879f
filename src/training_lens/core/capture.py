"""One run under the lens: calls the collectors that are due, stores their results, and contains their failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from training_lens.config.lens_section import LensSection
from training_lens.core import table_names as tables
from training_lens.core.capture_files import LENS
from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.lens_writer import LensWriter
from training_lens.core.modules import GradientGetter, is_identity_adapter
from training_lens.core.overhead_budget import OverheadBudget
from training_lens.core.probe import read_probe_states, score_probe
from training_lens.core.row_losses import RowLosses, select_rows
from training_lens.core.types import Cadence, Captured, LensManifest, Moment
from training_lens.models.model_classes import evaluation_mode
from training_lens.utils.devices import Precision, autocast
from training_lens.utils.formatting import describe_error
from training_lens.utils.integrity import safe_save
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
PROBE = "probe.safetensors"  # in the lens folder, with lens.keep_probe
MOST_DIVERGENCES = 12  # in a run, of those that validations bring besides the schedule's


@dataclass(frozen=True)
class RunFacts:
    """What a loop knows of its run at the start.

    `after_step` is the last step before a resume, 0 for a new run. `settings` are `LensManifest.settings`. `precision`
    is that of the probe's forward passes. `from_main` gives a value of the main process, where all run those together.
    """

    origin: str = "hand"
    after_step: int = 0
    precision: Precision = "fp32"
    settings: Mapping[str, Any] | None = None
    from_main: Callable[[Any], Any] = lambda value: value

    @property
    def total_steps(self) -> int | None:
        return (self.settings or {}).get("total_steps")


class Capture:
    """Runs the collectors that are due. A collector that fails is switched off; a store that fails ends the capture.

    Raises:
        LensError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        section: LensSection,
        collectors: Sequence[DataCollector],
        context: CaptureContext,
        facts: RunFacts,
    ) -> None:
        self.context, self._section = context, section
        self._facts = facts
        has_probe = [c for c in collectors if c.moment is not Moment.PROBE or context.probe]
        self._active = [c for c in has_probe if c.applies_to(context)]
        self._budget = OverheadBudget(section, facts.total_steps)
        self._step, self._is_over = facts.after_step, False
        self._base_states: Tensor | None = None  # of the probe's targets, for brief passes
        resumed = {c.name for c in self._active if facts.after_step and (folder / c.name).is_dir()}
        if facts.after_step == 0 and (folder / LENS).is_file():
            logger.warning("the captures of an earlier run in %s are replaced", folder)
        self._writer = LensWriter(folder, self._build_manifest(), section, facts.after_step)
        self._last_steps = facts.from_main(self._writer.last_steps())  # collector -> its last captured step
        self._save_probe(folder / PROBE, section.keep_probe)
        self._budget.seconds |= self._writer.cost()  # of the run before it was resumed
        for collector in tuple(self._active):
            with self._guard(collector, 0):
                captured = collector.start(context)
                self._store(collector, 0, None if collector.name in resumed else captured)
        if facts.after_step == 0:
            self._run_probe(0, self._collectors_at(Moment.PROBE))
        self._budget.start_step()

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far by name: collectors, and what serves them all."""
        return self._budget.seconds

    def is_due(self, step: int) -> bool:
        """Whether this step's gradients or update are captured."""
        return bool(self._due_collectors(Moment.GRADIENTS, step) or self._due_collectors(Moment.UPDATE, step))

    def capture_gradients(self, step: int, gradient_of: GradientGetter, *, is_failed: bool = False) -> None:
        """See `TrainingLensFramework.capture_gradients`; `is_failed`: capture only where none are due."""
        context = self.context
        if self._is_over or self.is_due(step) is is_failed:
            context.before = context.gradients = ()
            return
        with self._budget.measure("stacks", self._batch_cadence(step)), self._end_on_failure():
            context.before = [batch.copy_weights() for batch in context.batches]  # a loop may have changed them since
            context.gradients = [batch.copy_gradients(gradient_of) for batch in context.batches]
        at_gradients = Moment.GRADIENTS
        self._collect(
            self._collectors_at(at_gradients) if is_failed else self._due_collectors(at_gradients, step), step
        )

    def capture_update(self, step: int) -> None:
        """The optimizer has just stepped."""
        due = [] if self._is_over else self._due_collectors(Moment.UPDATE, step)
        with self._budget.measure("stacks", self._batch_cadence(step)), self._end_on_failure():
            self.context.after = [batch.copy_weights() for batch in self.context.batches] if due else ()
        self._collect(due, step)

    def record_step(self, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        """See `TrainingLensFramework.record_step`."""
        context, budget = self.context, self._budget
        self._step = step
        self._store_row(tables.LOSS, step, values)
        budget.end_step()
        flush_cadence = Cadence.SNAPSHOTS if budget.has_spent(Cadence.SNAPSHOTS) else None
        with budget.measure("flush", flush_cadence), self._end_on_failure():
            self._writer.flush_if_due(self.seconds)
        budget.update_schedules()
        self._follow_main()
        self._run_probe(step, self._due_collectors(Moment.PROBE, step))
        context.before = context.gradients = context.after = ()  # frees memory for the next step's activations
        budget.start_step()

    def _follow_main(self) -> None:
        """Capture what the main process does: where the base is sharded, a pass is one of all processes together."""
        names = [collector.name for collector in self._active]
        found = self._facts.from_main((self._budget.intervals, names, self._is_over))
        self._budget.intervals, names, self._is_over = found
        self._active = [collector for collector in self._active if collector.name in names]

    def record_rows(self, step: int, rows: RowLosses, table: str = tables.ROW_LOSSES) -> None:
        """See `TrainingLensFramework.record_rows`."""
        settings = self._facts.settings or {}
        every = settings.get(f"{table}_every", 1) if self._section.row_losses_megabytes else 0
        if every and not self._is_over:
            with self._budget.measure(tables.ROW_LOSSES), self._end_on_failure():
                captured = select_rows(rows, every)
                if captured.rows:
                    self._writer.add(table, step, captured)

    def record_evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        """See `TrainingLensFramework.record_evaluation`. The divergence from the base is measured at it, too."""
        self._store_row(tables.EVALUATION, step, values)
        if step and self._is_divergence_due(step):
            divergence = [c for c in self._collectors_at(Moment.PROBE) if c.name == tables.DIVERGENCE]
            self._run_probe(step, divergence, is_brief=True)
        self._budget.start_step()

    def _is_divergence_due(self, step: int) -> bool:
        """Whether the last measurement is at least a twelfth of the run back."""
        since, total = step - self._last_steps.get(tables.DIVERGENCE, 0), self._facts.total_steps
        return total is not None and since >= max(1, total / MOST_DIVERGENCES)

    def pending_tables(self) -> dict[str, Callable[[], pa.Table]]:
        """See `LensWriter.pending_tables`."""
        return self._writer.pending_tables()

    def flush(self) -> None:
        """See `TrainingLensFramework.flush`."""
        with self._budget.measure("flush"), self._end_on_failure():
            self._writer.flush(self.seconds)

    def stop(self, has_failed: bool) -> None:
        """See `TrainingLensFramework.stop`."""
        if self._step and not (has_failed or self._is_over):  # what is captured at intervals and was not due now
            missing = [c for c in self._active if c.cadence is not Cadence.SCALARS]
            missing = [c for c in missing if self._last_steps.get(c.name) != self._step]
            with self._budget.measure("stacks"), self._end_on_failure():
                self.context.after = [batch.copy_weights() for batch in self.context.batches]
            self._collect([c for c in missing if c.moment is Moment.UPDATE], self._step)
            self._run_probe(self._step, [c for c in missing if c.moment is Moment.PROBE])
        with self._budget.measure("flush"), self._end_on_failure():
            self._writer.close(self.seconds)
        self._is_over = True

    def _batch_cadence(self, step: int) -> Cadence | None:
        """Which cadence pays for a step's copies: scalars, which need them most often."""
        return Cadence.SCALARS if self._budget.is_due(Cadence.SCALARS, step) else None

    def _save_probe(self, path: Path, is_kept: bool) -> None:
        """The probe's tokens are the user's own text: they are saved with lens.keep_probe alone."""
        probe = self.context.probe
        with self._end_on_failure():
            path.unlink(missing_ok=True)
            if is_kept and probe:
                safe_save({"input_ids": probe.input_ids, "loss_mask": probe.loss_mask, "lengths": probe.lengths}, path)

    def _build_manifest(self) -> LensManifest:
        return LensManifest(
            modules=tuple(module.record for module in self.context.modules),
            origin=self._facts.origin,
            tables={c.name: c.data_type for c in self._active} | tables.LOOP_TABLES,
            settings={**(self._facts.settings or {}), **_list_frozen(self.context)},
            probe=self.context.probe.token_counts() if self.context.probe else None,
        )

    def _collectors_at(self, moment: Moment) -> list[DataCollector]:
        return [c for c in self._active if c.moment is moment]

    def _due_collectors(self, moment: Moment, step: int) -> list[DataCollector]:
        return [c for c in self._collectors_at(moment) if self._budget.is_due(c.cadence, step)]

    def _collect(self, collectors: Sequence[DataCollector], step: int) -> None:
        for collector in () if self._is_over else collectors:
            with self._guard(collector, step):
                self._store(collector, step, collector.collect(self.context, step))

    def _run_probe(self, step: int, collectors: Sequence[DataCollector], is_brief: bool = False) -> None:
        """Run the probe set through the model with the adapter off and on, under the collectors' hooks.

        While the adapter adds nothing, one pass with the adapter on serves as both. `is_brief`: the collectors look at
        scores alone, so that the base's states are computed once in a run; it does not count against a cadence's share.
        """
        context = self.context
        if self._is_over or not collectors or context.probe is None:
            return
        started = time.perf_counter()
        try:
            with self._budget.measure("probe"), ExitStack() as stack:
                context.one_pass = is_identity_adapter(context.model)
                stack.enter_context(torch.no_grad())
                stack.enter_context(evaluation_mode(context.model))
                stack.enter_context(autocast(context.probe.input_ids.device, self._facts.precision))
                for collector in collectors:
                    stack.enter_context(collector.probe_hooks(context))
                if is_brief and self._base_states is None:
                    self._base_states = read_probe_states(context.model, context.probe)
                known = self._base_states if is_brief else None
                context.scores = score_probe(context.model, context.probe, context.one_pass, known)
        except Exception as error:
            self._switch_off(self._collectors_at(Moment.PROBE), step, error)
        else:
            self._collect(collectors, step)
        context.scores = None
        if is_brief:
            return
        passes = 2 if context.one_pass else 1  # later captures take two passes
        for cadence in {collector.cadence for collector in collectors}:
            self._budget.spend(cadence, passes * (time.perf_counter() - started))

    def _store(self, collector: DataCollector, step: int, captured: Captured | None) -> None:
        if captured is not None and not self._is_over:
            self._last_steps[collector.name] = step
            with self._end_on_failure():
                self._writer.add(collector.name, step, captured)

    def _store_row(self, table: str, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        if not self._is_over:
            device = next((v.device for v in values.values() if isinstance(v, Tensor)), "cpu")
            with self._budget.measure("stacks"), self._end_on_failure():
                rows = {
                    name: torch.as_tensor(value, dtype=torch.float32, device=device).detach().reshape(1)
                    for name, value in values.items()
                    if value is not None
                }
                if rows:
                    self._writer.add(table, step, Captured(rows))

    @contextmanager
    def _guard(self, collector: DataCollector, step: int) -> Iterator[None]:
        """Time a collector, and switch it off if it raises."""
        counts = step and collector.moment is not Moment.PROBE  # `_run_probe` counts its collectors' time itself
        try:
            with self._budget.measure(collector.name, collector.cadence if counts else None):
                yield
        except Exception as error:
            self._switch_off([collector], step, error)

    def _switch_off(self, collectors: Sequence[DataCollector], step: int, error: Exception) -> None:
        for collector in collectors:
            with suppress(ValueError):
                self._active.remove(collector)
        names = ", ".join(c.name for c in collectors)
        logger.warning(
            "the lens switches off %s after step %d: %s Training continues.", names, step, describe_error(error)
        )
        logger.debug("in %s", names, exc_info=error)

    @contextmanager
    def _end_on_failure(self) -> Iterator[None]:
        """A failure of what every collector needs, such as the store, ends the capture and not the run."""
        try:
            yield
        except Exception as error:
            if not self._is_over:
                self._is_over = True
                logger.warning(
                    "the lens stops capturing after step %d: %s Training continues.", self._step, describe_error(error)
                )
                logger.debug("in what all collectors need", exc_info=error)


def _list_frozen(context: CaptureContext) -> dict[str, list[str]]:
    """Under `frozen`, the factors that do not require gradients, as `module.A` and `module.B`; empty without any."""
    factors = ((f"{m.name}.{of}", factor) for m in context.modules for of, factor in (("A", m.a), ("B", m.b)))
    frozen = [name for name, factor in factors if not factor.requires_grad]
    return {"frozen": frozen} if frozen else {}
