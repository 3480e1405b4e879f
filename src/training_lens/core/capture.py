"""One run under the lens: which collectors are due at which moment, what they cost, and what becomes of failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.config.lens_section import LensSection
from training_lens.core import table_names as tables
from training_lens.core.collector import DataCollector, Pace, Watched
from training_lens.core.lens_manifest import LENS
from training_lens.core.lens_writer import LensWriter
from training_lens.core.modules import adds_nothing
from training_lens.core.probe import as_judged, probe_scores
from training_lens.core.types import Cadence, Captured, DataType, LensManifest, Moment
from training_lens.utils.devices import Precision, autocast
from training_lens.utils.formatting import describe_error
from training_lens.utils.integrity import safe_save
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
Gradient = Callable[[torch.nn.Parameter], Tensor | None]
SHARES = {  # of the training time, where the config sets no interval: 2 % in all
    Cadence.SCALARS: 0.01,
    Cadence.SPECTRA: 0.0025,
    Cadence.PROBE: 0.005,
    Cadence.SNAPSHOTS: 0.0025,
}
SCALARS, SCALARS_FIRST = 200, 20  # captures at least in a run whose length is known; first steps that are all captured
SPECTRA = 8  # at least, in a run whose length is known
SNAPSHOTS = (4, 8)  # at least and at most, in a run whose length is known
SNAPSHOT_STEPS = 500  # between them, in one whose length is not
PROBE = "probe.safetensors"  # in the lens folder, where lens.keep_probe asks for it
STEPS_REMEMBERED = 10  # by the running mean of a step's seconds


@dataclass(frozen=True)
class RunFacts:
    """What a loop tells of its run at the start.

    `after_step` is the step that a resumed run goes on after; `settings` are `LensManifest.settings`; `precision` is
    that of the probe's forward passes.
    """

    origin: str = "hand"
    after_step: int = 0
    precision: Precision = "fp32"
    settings: Mapping[str, Any] | None = None

    @property
    def total_steps(self) -> int | None:
        return (self.settings or {}).get("total_steps")


class Capture:
    """Calls what is due and keeps its time. A collector that fails is off from there; a store that fails ends it all.

    Raises:
        LensError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        section: LensSection,
        collectors: Sequence[DataCollector],
        watched: Watched,
        facts: RunFacts,
    ) -> None:
        self.watched = watched
        self._section, self._facts = section, facts
        self._live = [c for c in collectors if c.moment is not Moment.PROBE or watched.probe]
        self._paces = {cadence: self._pace(cadence) for cadence in Cadence}
        self._step, self._over = facts.after_step, False
        self._steps, self._step_seconds, self._clock = 0, 0.0, time.perf_counter()  # seen by this process
        self._took: dict[Cadence, float] = {}  # seconds of the last captures, until the step is over
        known = {c.name for c in self._live if facts.after_step and (folder / c.name).is_dir()}
        if facts.after_step == 0 and (folder / LENS).is_file():
            logger.warning("the captures of an earlier run in %s are replaced", folder)
        self._writer = LensWriter(folder, self._manifest(), section, facts.after_step)
        self._last = self._writer.last_steps()  # collector -> the step that it captured last
        self._keep_probe(folder / PROBE)
        self.seconds = self._writer.cost()  # of the run before it was resumed
        for collector in tuple(self._live):
            with self._guarded(collector, 0):
                started = collector.start(watched)
                self._keep(collector, 0, None if collector.name in known else started)  # a resumed run has it
        if facts.after_step == 0:
            self._go_through_probe(0, self._of(Moment.PROBE))
        self._clock = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether gradients or an update of this step are looked at."""
        return bool(self._due(Moment.GRADIENTS, step) or self._due(Moment.UPDATE, step))

    def gradients(self, step: int, of: Gradient, passed_over: bool = False) -> None:
        """See `TrainingLensFramework.gradients`; with `passed_over`, at a step at which none are due."""
        watched = self.watched
        if self._over or self.due(step) is passed_over:
            watched.before = watched.gradients = ()
            return
        with self._timed("stacks", self._stacks_for(step)), self._needed():
            watched.before = [group.weights() for group in watched.groups]  # a loop may have changed them since
            watched.gradients = [group.gradients(of) for group in watched.groups]
        self._collect(self._of(Moment.GRADIENTS) if passed_over else self._due(Moment.GRADIENTS, step), step)

    def update(self, step: int) -> None:
        """See `TrainingLensFramework.update`."""
        due = [] if self._over else self._due(Moment.UPDATE, step)
        with self._timed("stacks", self._stacks_for(step)), self._needed():
            self.watched.after = [group.weights() for group in self.watched.groups] if due else ()
        self._collect(due, step)

    def record(self, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        """See `TrainingLensFramework.record`."""
        self._step = step
        self._row(tables.LOSS, step, values)
        self._steps += 1
        took = time.perf_counter() - self._clock
        self._step_seconds += (took - self._step_seconds) / min(self._steps, STEPS_REMEMBERED)
        with self._timed("flush", Cadence.SNAPSHOTS if Cadence.SNAPSHOTS in self._took else None), self._needed():
            self._writer.flush_if_due(self.seconds)
        for cadence, pace in self._paces.items():  # only now: before, nobody knows how long a step is
            if cadence in self._took:
                pace.took(self._took.pop(cadence), self._step_seconds)
            else:
                pace.steps_take(self._step_seconds)
        self._go_through_probe(step, self._due(Moment.PROBE, step))
        self.watched.before = self.watched.gradients = self.watched.after = ()  # room for the next step's activations
        self._clock = time.perf_counter()

    def evaluation(self, step: int, loss: float, base: bool) -> None:
        """See `TrainingLensFramework.evaluation`."""
        self._row(tables.EVALUATION, step, {"base_loss" if base else "loss": loss})
        self._clock = time.perf_counter()

    def flush(self) -> None:
        """See `TrainingLensFramework.flush`."""
        with self._timed("flush"), self._needed():
            self._writer.flush(self.seconds)

    def stop(self, failed: bool) -> None:
        """See `TrainingLensFramework.stop`."""
        if self._step and not (failed or self._over):
            rare = [c for c in self._live if c.cadence is not Cadence.SCALARS and self._last.get(c.name) != self._step]
            with self._timed("stacks"), self._needed():
                self.watched.after = [group.weights() for group in self.watched.groups]
            self._collect([c for c in rare if c.moment is Moment.UPDATE], self._step)
            self._go_through_probe(self._step, [c for c in rare if c.moment is Moment.PROBE])
        with self._timed("flush"), self._needed():
            self._writer.close(self.seconds)
        self._over = True

    def _pace(self, cadence: Cadence) -> Pace:
        section, total, share = self._section, self._facts.total_steps, SHARES[cadence]
        if cadence is Cadence.SCALARS:
            return Pace(section.scalars_every, share, total, least=SCALARS, most=None, always=SCALARS_FIRST)
        if cadence is Cadence.SNAPSHOTS:
            every, (least, most) = section.snapshot_every or (None if total else SNAPSHOT_STEPS), SNAPSHOTS
            return Pace(every, share, total, least=least, most=most)
        if cadence is Cadence.SPECTRA:
            return Pace(section.spectra_every, share, total, least=SPECTRA)
        return Pace(section.probe_every, share, total, from_step=0)  # there before the first step, too

    def _stacks_for(self, step: int) -> Cadence | None:
        """Whose share the stacks of a step belong to: that of scalars, which need them most often."""
        return Cadence.SCALARS if self._paces[Cadence.SCALARS].due(step) else None

    def _keep_probe(self, path: Path) -> None:
        """The probe set's tokens, only where the config asks for them: they are the user's own text."""
        probe = self.watched.probe
        with self._needed():
            path.unlink(missing_ok=True)
            if self._section.keep_probe and probe:
                safe_save({"input_ids": probe.input_ids, "loss_mask": probe.loss_mask, "lengths": probe.lengths}, path)

    def _manifest(self) -> LensManifest:
        return LensManifest(
            modules=tuple(module.record for module in self.watched.modules),
            origin=self._facts.origin,
            tables={c.name: c.data_type for c in self._live}
            | {tables.LOSS: DataType.LOSS, tables.EVALUATION: DataType.LOSS},
            settings=dict(self._facts.settings or {}),
            probe=self.watched.probe.sizes() if self.watched.probe else None,
        )

    def _of(self, moment: Moment) -> list[DataCollector]:
        return [c for c in self._live if c.moment is moment]

    def _due(self, moment: Moment, step: int) -> list[DataCollector]:
        return [c for c in self._of(moment) if self._paces[c.cadence].due(step)]

    def _collect(self, collectors: Sequence[DataCollector], step: int) -> None:
        for collector in () if self._over else collectors:
            with self._guarded(collector, step):
                self._keep(collector, step, collector.collect(self.watched, step))

    def _go_through_probe(self, step: int, collectors: Sequence[DataCollector]) -> None:
        """One pass of the probe set with the adapter off and one with it on, watched by all that are due.

        While the adapter adds nothing the second stands for both: that halves what comes before the first step.
        """
        watched = self.watched
        if self._over or not collectors or watched.probe is None:
            return
        started = time.perf_counter()
        try:
            with self._timed("probe"), ExitStack() as around:
                watched.one_pass = adds_nothing(watched.model)
                around.enter_context(as_judged(watched.model))
                around.enter_context(autocast(watched.probe.input_ids.device, self._facts.precision))
                for collector in collectors:
                    around.enter_context(collector.watching(watched))
                watched.scores = probe_scores(watched.model, watched.probe, watched.one_pass)
        except Exception as error:
            self._switch_off(self._of(Moment.PROBE), step, error)
        else:
            self._collect(collectors, step)
        watched.scores = None
        passes = 2 if watched.one_pass else 1  # later ones go through the model twice
        for cadence in {collector.cadence for collector in collectors}:
            self._spent(cadence, passes * (time.perf_counter() - started))

    def _keep(self, collector: DataCollector, step: int, captured: Captured | None) -> None:
        if captured is not None and not self._over:
            self._last[collector.name] = step
            with self._needed():
                self._writer.add(collector.name, step, captured)

    def _row(self, table: str, step: int, values: Mapping[str, float | Tensor | None]) -> None:
        if not self._over:
            device = next((v.device for v in values.values() if isinstance(v, Tensor)), "cpu")
            with self._timed("stacks"), self._needed():
                known = {k: _cell(v, device) for k, v in values.items() if v is not None}
                if known:
                    self._writer.add(table, step, Captured(known))

    @contextmanager
    def _timed(self, name: str, cadence: Cadence | None = None) -> Iterator[None]:
        """Adds to the cost, and to what the cadence has spent of its share."""
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            if cadence:
                self._spent(cadence, took)

    def _spent(self, cadence: Cadence, seconds: float) -> None:
        self._took[cadence] = self._took.get(cadence, 0.0) + seconds

    @contextmanager
    def _guarded(self, collector: DataCollector, step: int) -> Iterator[None]:
        """A collector's own time, and its failure."""
        paced = step and collector.moment is not Moment.PROBE  # where the probe's passes count, too
        try:
            with self._timed(collector.name, collector.cadence if paced else None):
                yield
        except Exception as error:
            self._switch_off([collector], step, error)

    def _switch_off(self, collectors: Sequence[DataCollector], step: int, error: Exception) -> None:
        for collector in collectors:
            with suppress(ValueError):
                self._live.remove(collector)
        names = ", ".join(c.name for c in collectors)
        logger.warning(
            "the lens switches off %s after step %d: %s Training goes on.", names, step, describe_error(error)
        )
        logger.debug("in %s", names, exc_info=error)

    @contextmanager
    def _needed(self) -> Iterator[None]:
        """What all collectors need, as a store that can be written: without it the capture ends, and not the run."""
        try:
            yield
        except Exception as error:
            if not self._over:
                self._over = True
                logger.warning(
                    "the lens stops capturing after step %d: %s Training goes on.", self._step, describe_error(error)
                )
                logger.debug("in what all collectors need", exc_info=error)


def _cell(value: float | Tensor, device: torch.device | str) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).detach().reshape(1)
