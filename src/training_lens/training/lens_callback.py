"""The lens in our own training loop: a callback that drives it, and the report when training ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training_lens.core.capture import RunFacts
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.probe import Probe
from training_lens.core.row_losses import RowLosses, choose_interval
from training_lens.core.table_names import LOSS, MEASURES
from training_lens.data.batching import epoch_order
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import LossReport
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.loop.optimizer import clip_factor
from training_lens.training.plan import RunPlan
from training_lens.utils.formatting import describe_error, format_count
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
LOSS_MEASURES = [f.name for f in fields(StepReport) if f.name in MEASURES[LOSS]]


class CaptureCallback(Callback):
    """Drives a lens from the loop's events.

    Args:
        settings: facts about the run for the analysis, see `LensManifest`.
    """

    def __init__(self, lens: TrainingLensFramework, settings: Mapping[str, Any]) -> None:
        self.lens, self._settings = lens, settings
        self._held_out_ids: list[str] = []

    @property
    def capture_seconds(self) -> float:
        """Total time spent on capturing so far."""
        return sum(self.lens.seconds.values())

    def on_train_start(self, trainer: Any) -> None:
        facts = RunFacts("training-lens", trainer.state.step, trainer.precision, self._settings)
        if trainer.processes.is_base_sharded:
            facts = replace(facts, from_main=trainer.processes.from_main)
        self.lens.start(trainer.model, trainer.optimizer, facts)

    def on_gradients(self, trainer: Any, step: int) -> None:
        self.lens.capture_gradients(step)

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        max_norm, norm = trainer.settings.max_grad_norm, torch.tensor(report.grad_norm, dtype=torch.float64)
        clip = float(clip_factor(norm, max_norm)) if max_norm else 1.0
        self.lens.record_rows(report.step, report.losses_by_row)
        self.lens.record_step(report.step, {"clip": clip, **{name: getattr(report, name) for name in LOSS_MEASURES}})

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        self._record_held_out(trainer.validation, step, report)
        self.lens.record_evaluation(step, report.loss, base=base, sample={"sample_loss": report.sample_loss})

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        self._record_held_out(trainer.validation, step, report, trainer.validation_sample.positions)
        self.lens.record_evaluation(step, None, sample={"sample_loss": report.loss, "sample_error": report.error})

    def _record_held_out(
        self, rows: TokenDataset, step: int, report: LossReport, positions: np.ndarray | None = None
    ) -> None:
        """Store the losses of the validation rows, or of those at `positions`, which a validation computes anyway."""
        if report.row_nll is None or not self._settings.get("held_out_row_losses_every", 1):
            return
        self._held_out_ids = self._held_out_ids or rows.ids
        places = np.arange(len(rows)) if positions is None else positions
        tokens = rows.supervised_counts[places]
        ids = [self._held_out_ids[place] for place in places]
        self.lens.record_rows(step, RowLosses(ids, report.row_nll / tokens, tokens), held_out=True)

    def on_save(self, trainer: Any) -> None:
        self.lens.flush()

    def on_train_end(self, trainer: Any) -> None:
        self.lens.stop()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.lens.capture_failed_step()
        self.lens.stop(failed=True)


def build_capture_callback(plan: RunPlan, folder: Path) -> CaptureCallback | None:
    """The lens callback for the config, which writes into `folder`; None if the lens is off."""
    config, rows = plan.config, plan.validation or plan.train
    if not config.lens.enabled:
        return None
    settings = {
        "total_steps": plan.schedule.total_steps,
        "steps_per_epoch": plan.schedule.steps_per_epoch,
        "max_grad_norm": config.training.max_grad_norm,
        "lr": config.training.lr,
        "train_examples": len(plan.train),
        **count_visits(plan),
        "row_losses_every": _choose_recorded_rows(plan),
        "held_out_row_losses_every": choose_interval(_count_held_out_visits(plan), config.lens.row_losses_megabytes),
        "sample_rows": 0 if plan.validation_sample is None else len(plan.validation_sample.positions),
    }
    probe = Probe.from_dataset(rows, config.lens.probe_tokens, fill_id=plan.tokenizer.eos_token_id)
    return CaptureCallback(TrainingLensFramework(folder, config.lens, probe=probe), settings)


def _choose_recorded_rows(plan: RunPlan) -> int:
    """One training row in how many has its losses recorded; says so where it is not each of them."""
    megabytes, visits = plan.config.lens.row_losses_megabytes, plan.schedule.total_steps * plan.schedule.global_batch
    every = choose_interval(visits, megabytes)
    if every > 1:
        logger.info(
            "lens: the losses of one training row in %d are recorded, as the %s visits of all would take more than "
            "lens.row_losses_megabytes=%d",
            *(every, format_count(visits), megabytes),
        )
    return every


def _count_held_out_visits(plan: RunPlan) -> int:
    """How many losses of single validation rows the run computes, the base's among them."""
    if plan.validation is None:
        return 0
    total, sample = plan.schedule.total_steps, plan.validation_sample
    validations = 2 + total // (plan.config.training.eval_steps or plan.schedule.steps_per_epoch)
    return validations * len(plan.validation) + (len(sample.positions) * total // sample.every if sample else 0)


def count_visits(plan: RunPlan) -> dict[str, int | float]:
    """How many different examples an epoch has, and how often it visits each, on average: duplicates and weights count.

    Examples of one rendered text are the same one. Counted in the first epoch's order, as later ones draw alike.
    """
    schedule = plan.schedule
    order = epoch_order(schedule.examples, schedule.seed, 0, schedule.mix)
    distinct = len(np.unique(plan.train.digests[order]))
    return {"distinct_examples": distinct, "visits_per_epoch": len(order) / distinct}


def write_lens_report(run: RunFolder) -> Path | None:
    """Write the report of a finished run and log three lines of it; None if that failed, which is logged.

    A failure does not fail the run: its adapter has been saved.
    """
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
    from training_lens.analysis.reports.executive import three_lines
    from training_lens.analysis.reports.standard import StandardReports

    try:
        analysis = CheckpointAnalyzer(run.root).analyze()
        report = StandardReports(analysis).write(run.reports, "technical", "html")
        for line in three_lines(analysis):
            logger.info("lens: %s", line)
    except Exception as error:
        logger.warning("the lens has no report of this run: %s", describe_error(error))
        logger.debug("in the report", exc_info=True)
        return None
    logger.info("lens: the report is %s", report)
    return report
