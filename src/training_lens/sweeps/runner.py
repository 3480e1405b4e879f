"""The sweep loop: claim a trial, train it as a normal run, record its end, until no trial is left."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from training_lens.config.run_config import consent_for, remember_consent
from training_lens.config.schema import TrainingConfig
from training_lens.errors import CheckpointError, ConfigurationError, InterruptedRunError, PrunedRunError, TrainingError
from training_lens.evaluation.evaluator import LossReport
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.sweeps.leaderboard import (
    Leaderboard,
    Recommendation,
    TrialRow,
    build_leaderboard,
    build_row,
    recommend_trial,
    sum_blocks,
)
from training_lens.sweeps.space import Space
from training_lens.sweeps.study import SharedStudy, free_settings
from training_lens.sweeps.sweep_report import write_results
from training_lens.sweeps.trials import FINISHED, is_default, run_id
from training_lens.sweeps.worker import Worker
from training_lens.training.loop.callbacks import Callback
from training_lens.training.loop.lr_schedule import default_lr
from training_lens.training.plan import RunPlan, write_rows_as_files
from training_lens.training.run import TrainingWrapper
from training_lens.training.summary import TrainingSummary
from training_lens.utils.devices import free_memory
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import RepeatFilter, filter_screen, get_logger, quiet_screen
from training_lens.utils.names import require_contained
from training_lens.utils.nested import merge_sections

logger = get_logger(__name__)
MOST_FAILURES = 3  # failures without a finished trial, after which the sweep stops
MOST_DEATHS = 2  # process deaths after which a trial counts as failed: out of memory, it would die every time


def sweep_folder(config: TrainingConfig) -> Path:
    """The folder of a sweep's study and results: {base_output_dir}/sweeps/{name}."""
    return Path(config.output.base_output_dir) / "sweeps" / config.sweep.name


@dataclass(frozen=True)
class SweepResult:
    """The leaderboard of a sweep, its files by name, and the recommended settings."""

    leaderboard: Leaderboard
    files: dict[str, str]
    recommendation: Recommendation | None = None


class Sweep:
    """Runs the trials of `config.sweep`, shared with all processes that get the same config.

    Args:
        config: the base config of every trial, with the sweep section.
        console: for the progress bars of the trials; None: no bars.
        on_trial: called with every trial that ends in this process.

    Raises:
        ConfigurationError: the space, the base config or the storage is invalid.
        CheckpointError: a symbolic link leads out of the sweep's folder.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        console: Console | None = None,
        on_trial: Callable[[TrialRow], None] = lambda row: None,
    ) -> None:
        if config.output.run_id:
            raise ConfigurationError("output.run_id: every trial of a sweep has its own id; leave it out.")
        if config.tracking.hub.repo:
            logger.warning(
                "tracking.hub.repo: trials are not pushed to %s, where each would replace the last one; push the best "
                "trial after the sweep",
                config.tracking.hub.repo,
            )
        self.config = write_rows_as_files(config, Path(config.output.base_output_dir) / "cache" / "rows")
        self.space = Space.from_config(self.config)
        self.folder = sweep_folder(self.config)
        self._console, self._on_trial = console, on_trial
        self._once = RepeatFilter()  # shows messages on rows and model once, not again for each trial
        with filter_screen(self._once):
            plan = _plan_first_trial(_trial_config(self.config), self.space, console)
        rows = {f"data.{name}": split.fingerprint[:12] for name, split in plan.splits.items()}
        default = {key: attrgetter(key)(self.config) for key in self.space.dimensions}
        if "training.lr" in default and default["training.lr"] is None:
            default["training.lr"] = default_lr(plan.facts.width)
        self.folder.mkdir(parents=True, exist_ok=True)
        require_contained(self.folder)
        self.study = SharedStudy(self.config, self.space, self.folder, rows, default)

    def run(self) -> SweepResult:
        """Run trials until all are claimed; then write and return the results of all processes so far.

        Raises:
            TrainingError: the first trials all failed, the storage is lost, or a run's files cannot be read or written.
            InterruptedRunError: a signal came. Results are written and the trial's run is saved; the next start
                resumes it.
        """
        gc.freeze()  # objects that exist now stay: later collections can skip them
        try:
            with self.study.explain_lost_database(), Worker(self.folder / "workers") as worker, quiet_screen():
                try:
                    with filter_screen(self._once):
                        self._run_trials(worker)
                except InterruptedRunError:
                    self._write_results()
                    raise
                return self._write_results()
        finally:
            gc.unfreeze()
            self.study.close()

    def _run_trials(self, worker: Worker) -> None:
        failures = 0
        while (trial := self.study.claim_trial(worker)) is not None:
            watcher = PruningCallback(self.study, trial)
            row = self._run_trial(trial, watcher)
            self._on_trial(row)
            if watcher.asked_to_leave:
                raise InterruptedRunError(
                    f"stopped as trial {row.trial} ended, which is recorded. Start the same command again to continue.",
                    watcher.asked_to_leave,
                )
            failures += row.state == "failed"
            if failures >= MOST_FAILURES and not any(t.state in FINISHED for t in self.study.current_trials()):
                raise TrainingError(
                    f"the first {MOST_FAILURES} trials of the sweep '{self.config.sweep.name}' failed. The last one "
                    f"({row.run_id}): {row.error} Fix it; the same command then continues with other trials, and "
                    "another sweep.name starts over."
                )

    def _write_results(self) -> SweepResult:
        settings = self.config.sweep
        with FileLock(self.folder / "results.lock"):  # processes write in the order in which they read the trials
            trials = self.study.current_trials()
            found = build_leaderboard(settings.name, settings.metric, trials, self.space)
            chosen = recommend_trial(found, trials)
            remember_consent(self.folder, self.config)  # of best.yaml
            return SweepResult(found, write_results(self.folder, found, chosen, trials, self.config), chosen)

    def _run_trial(self, trial: FrozenTrial, watcher: PruningCallback) -> TrialRow:
        """Run one trial from its claim to its end in the study."""
        try:
            with self.study.send_heartbeats(trial):
                self._note_end(trial, self._train_trial(trial, watcher))
        except KeyboardInterrupt:
            self.study.release_trial(trial)
            raise
        except InterruptedRunError as error:
            self.study.release_trial(trial)
            raise InterruptedRunError(
                f"{error} Start the same command again: the sweep resumes this trial.", error.exit_code - 128
            ) from error
        except (OSError, CheckpointError) as error:  # a full disk; a damaged run, or one that another process trains
            self.study.release_trial(trial)
            raise TrainingError(
                f"{run_id(trial)}: {describe_error(error)} This is no failure of the trial. Fix it and start the same "
                "command again, which resumes the trial; a deleted run folder is trained from the start."
            ) from error
        except StorageInternalError:  # no failure of the trial
            raise
        except Exception as error:  # the next trial may work
            logger.debug("trial %d failed", trial.number, exc_info=True)
            self.study.end_trial(trial, TrialState.FAIL, error=describe_error(error))
        free_memory()  # of the trial's model, also where an error kept it alive until now
        return build_row(self.study.read_trial(trial), self.space)

    def _train_trial(self, trial: FrozenTrial, watcher: PruningCallback) -> TrainingSummary:
        """Train the trial's run from the start or from its last checkpoint; do nothing if it is done."""
        if self.study.count_deaths(trial) >= MOST_DEATHS:
            raise TrainingError("its process died twice, for example killed because the machine ran out of memory.")
        name, callbacks = self.config.sweep.name, (watcher,)
        run = RunFolder(runs_folder(self.config.output.base_output_dir, name) / run_id(trial))
        try:
            if not run.has_begun:
                params = {} if is_default(trial) else trial.params
                config = self.space.trial_config(self.config, params, {"experiment_name": name, "run_id": run.run_id})
                return TrainingWrapper(_trial_config(config), console=self._console, callbacks=callbacks).train()
            if run.status not in ("finished", "pruned"):
                mine = merge_sections(free_settings(self.config), consent_for(run, self.config))
                return TrainingWrapper.resume(run, mine, console=self._console, callbacks=callbacks)
        except PrunedRunError as error:
            logger.debug("%s", error)
        return TrainingSummary(**run.read_metadata("summary.json"))

    def _note_end(self, trial: FrozenTrial, summary: TrainingSummary) -> None:
        facts: dict[str, Any] = {"seconds": summary.seconds, "run_dir": summary.run_dir}
        state = TrialState.PRUNED if summary.status == "pruned" else TrialState.COMPLETE
        if summary.validation_loss is None:
            state, facts["error"] = TrialState.FAIL, "no validation gave a finite loss."
        self.study.end_trial(trial, state, summary.validation_loss, **facts)


def _trial_config(config: TrainingConfig) -> TrainingConfig:
    """The config of a trial: captures are kept, but no report is written unless asked for, and nothing is pushed."""
    config = config.replace_keys(tracking={"hub": {"repo": None}}) if config.tracking.hub.repo else config
    asked = "report" in config.lens.model_fields_set
    return config if asked else config.replace_keys(lens={"report": False})


class PruningCallback(Callback):
    """Reports each validation of a trial to its study, and ends the run if the pruner would.

    Trials are compared at the same number of validations, because steps differ with the batch size.
    """

    def __init__(self, study: SharedStudy, trial: FrozenTrial) -> None:
        self._study, self._trial = study, trial
        self.asked_to_leave = 0  # a signal that came while the trial ended by itself; it stops the sweep

    def on_train_end(self, trainer: Any) -> None:
        self.asked_to_leave = trainer.signal_number

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.asked_to_leave = trainer.signal_number

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        if base:
            return
        if trainer.state.best_step == step and report.row_nll is not None:  # the saved adapter
            self._study.keep_losses(self._trial, sum_blocks(report.row_nll))
        every = trainer.settings.eval_steps or trainer.schedule.steps_per_epoch
        is_worse = self._study.report_loss(self._trial, math.ceil(step / every), report.loss)
        may_end = step < trainer.schedule.total_steps and not is_default(self._trial)  # that one is the reference
        if is_worse and may_end:
            raise PrunedRunError(f"pruned at step {step}, with validation loss {report.loss:.4f}")


def _plan_first_trial(config: TrainingConfig, space: Space, console: Console | None) -> RunPlan:
    """Plan the first valid point, to find errors of the base config early and to fill the token cache of all trials."""
    plan = TrainingWrapper(space.trial_config(config, space.first_valid_point(config)), console=console).plan()
    if plan.processes.count > 1:
        raise ConfigurationError(
            f"a sweep trains each trial in one process, found {plan.processes.count}. Start the same command several "
            "times instead, without torchrun or accelerate launch: the trials are shared."
        )
    if plan.validation is None:
        raise ConfigurationError(
            "sweep.metric: trials are compared by their validation loss, but there are no validation rows; set "
            "data.validation or data.val_ratio."
        )
    every = plan.config.training.eval_steps or plan.schedule.steps_per_epoch
    if config.sweep.pruner != "none" and plan.schedule.total_steps <= every:
        logger.warning(
            "sweep.pruner: a run validates only once, at its end, so nothing is pruned; set training.eval_steps"
        )
    return plan
