"""The sweep itself: claim a trial, train it as a normal run, note how it ended, until no trial is left."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial
from rich.console import Console

from training_lens.config.run_config import consent_for, remember_consent
from training_lens.config.schema import TrainingConfig
from training_lens.errors import (
    CheckpointError,
    ConfigurationError,
    InterruptedRunError,
    PrunedRunError,
    TrainingError,
)
from training_lens.evaluation.evaluator import LossReport
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.sweeps.leaderboard import Leaderboard, TrialRow, build_leaderboard, build_row
from training_lens.sweeps.recommendation import Recommendation, recommend_trial, sum_blocks
from training_lens.sweeps.space import Space
from training_lens.sweeps.study import SharedStudy, free_settings
from training_lens.sweeps.study_storage import explain_lost_storage
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
MOST_FAILURES = 3  # failures with nothing finished, after which there is no use in going on
MOST_DEATHS = 2  # deaths of its process, after which a trial is a failed one: out of memory, it would die for ever


def sweep_folder(config: TrainingConfig) -> Path:
    """Where a sweep keeps its study and what it found: {base_output_dir}/sweeps/{name}."""
    return Path(config.output.base_output_dir) / "sweeps" / config.sweep.name


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, the files that say it, by name, and which settings to use."""

    leaderboard: Leaderboard
    files: dict[str, str]
    recommendation: Recommendation | None = None


class Sweep:
    """Runs the trials that `config.sweep` asks for, with every process that is given the same.

    Args:
        config: the base of every trial, and its sweep section.
        console: where the progress bars of trials go; None draws none.
        on_trial: called with each trial that ends in this process.

    Raises:
        ConfigurationError: the sweep could not begin: its space, its base config or its storage is wrong.
        CheckpointError: a symbolic link in its folder leads out of it.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        console: Console | None = None,
        on_trial: Callable[[TrialRow], None] = lambda row: None,
    ) -> None:
        if config.output.run_id:
            raise ConfigurationError("output.run_id: each trial of a sweep has an id of its own; leave it out.")
        if config.tracking.hub.repo:
            logger.warning(
                "tracking.hub.repo: trials are not pushed to %s, where each would replace the last; push the best one "
                "when the sweep is done",
                config.tracking.hub.repo,
            )
        self.config = write_rows_as_files(config, Path(config.output.base_output_dir) / "cache" / "rows")
        self.space = Space.from_config(self.config)
        self.folder = sweep_folder(self.config)
        self._console, self._on_trial = console, on_trial
        self._once = (
            RepeatFilter()
        )  # what the rehearsal said of the rows and the model is not said again for each trial
        with filter_screen(self._once):
            plan = _plan_first_trial(_trial_config(self.config), self.space, console)
        rows = {f"data.{name}": split.fingerprint[:12] for name, split in plan.splits.items()}
        default = _default_settings(self.config, self.space, plan)
        self.folder.mkdir(parents=True, exist_ok=True)
        require_contained(self.folder)
        self.study = SharedStudy(self.config, self.space, self.folder, rows, default)

    def run(self) -> SweepResult:
        """Run trials until all are taken; then write and give what all processes found so far.

        Raises:
            TrainingError: the first trials all failed, the storage is gone, or a run's files cannot be read or written.
            InterruptedRunError: a signal came; the trial's run is saved, and the next start goes on with it. What
                finished is written first.
        """
        gc.freeze()  # what is there now stays: the collections between trials need not look at it
        try:
            with explain_lost_storage(self.config.sweep), Worker(self.folder / "workers") as worker, quiet_screen():
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
                    f"stopped as trial {row.trial} ended, which is noted. Start the same command again to go on.",
                    watcher.asked_to_leave,
                )
            failures += row.state == "failed"
            if failures >= MOST_FAILURES:
                self._stop_if_all_failed(row)

    def _write_results(self) -> SweepResult:
        settings = self.config.sweep
        with FileLock(self.folder / "results.lock"):  # who reads the trials first writes first
            trials = self.study.current_trials()
            found = build_leaderboard(settings.name, settings.metric, trials, self.space)
            remember_consent(self.folder, self.config)  # of best.yaml
            return SweepResult(
                found, write_results(self.folder, found, trials, self.config), recommend_trial(found, trials)
            )

    def _run_trial(self, trial: FrozenTrial, watcher: PruningCallback) -> TrialRow:
        """One trial from its claim to its end in the study."""
        try:
            with self.study.send_heartbeats(trial):
                self._note_end(trial, self._train_trial(trial, watcher))
        except (InterruptedRunError, KeyboardInterrupt) as error:
            self.study.release_trial(trial)
            raise _explain_resume(error) from error
        except (OSError, CheckpointError) as error:  # a full disk, a run that another process trains or that is damaged
            self.study.release_trial(trial)
            raise TrainingError(
                f"{run_id(trial)}: {describe_error(error)} That is no failure of the trial: mend it and start the same "
                "command again, which goes on with it; a run folder that is deleted is trained from the start."
            ) from error
        except StorageInternalError:  # no failure of the trial
            raise
        except Exception as error:  # whatever it is, the next trial is another
            logger.debug("trial %d failed", trial.number, exc_info=True)
            self.study.fail_trial(trial, describe_error(error))
        free_memory()  # of the trial's model, also where an error kept it alive until now
        return build_row(self.study.read_trial(trial), self.space)

    def _train_trial(self, trial: FrozenTrial, watcher: PruningCallback) -> TrainingSummary:
        """The trial's run: from the start, or from where a process left it, or nothing where it was done already."""
        if self.study.count_deaths(trial) >= MOST_DEATHS:
            raise TrainingError("its process died twice: killed, for one where the machine ran out of memory.")
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
        if summary.validation_loss is None:
            self.study.fail_trial(trial, "no validation gave a number as its loss.", **facts)
        elif summary.status == "pruned":
            self.study.prune_trial(trial, summary.validation_loss, **facts)
        else:
            self.study.finish_trial(trial, summary.validation_loss, **facts)

    def _stop_if_all_failed(self, last: TrialRow) -> None:
        if not any(trial.state in FINISHED for trial in self.study.current_trials()):
            raise TrainingError(
                f"the first {MOST_FAILURES} trials of the sweep '{self.config.sweep.name}' failed, the last of them "
                f"({last.run_id}) so: {last.error} Fix it; the same command then goes on with other trials, and "
                "another sweep.name begins anew."
            )


def _trial_config(config: TrainingConfig) -> TrainingConfig:
    """A trial's captures are kept, but no page is written of each, unless that was asked for; none is pushed."""
    config = config.replace_keys(tracking={"hub": {"repo": None}}) if config.tracking.hub.repo else config
    asked = "report" in config.lens.model_fields_set
    return config if asked else config.replace_keys(lens={"report": False})


class PruningCallback(Callback):
    """Reports each validation of a trial to its study, and ends the run where the pruner would.

    Trials are compared at the same validation, the first with the first: steps differ with the batch size.
    """

    def __init__(self, study: SharedStudy, trial: FrozenTrial) -> None:
        self._study, self._trial = study, trial
        self.asked_to_leave = 0  # the signal that came while the trial ended by itself: it is for the sweep

    def on_train_end(self, trainer: Any) -> None:
        self.asked_to_leave = trainer.signal_number

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.asked_to_leave = trainer.signal_number

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        if base:
            return
        if trainer.state.best_step == step and report.row_nll is not None:  # the adapter that is saved
            self._study.keep_losses(self._trial, sum_blocks(report.row_nll))
        every = trainer.settings.eval_steps or trainer.schedule.steps_per_epoch
        validation = math.ceil(step / every)
        hopeless = self._study.report_loss(self._trial, validation, report.loss)
        may_end = step < trainer.schedule.total_steps and not is_default(self._trial)  # all are compared with that one
        if hopeless and may_end:
            raise PrunedRunError(f"pruned at step {step}, with validation loss {report.loss:.4f}")


def _default_settings(config: TrainingConfig, space: Space, plan: RunPlan) -> dict[str, Any]:
    """The base config's own values of the space's keys; the learning rate that it leaves open is the model's."""
    values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in space.dimensions}
    if "training.lr" in values and values["training.lr"] is None:
        values["training.lr"] = default_lr(plan.facts.width)
    return values


def _plan_first_trial(config: TrainingConfig, space: Space, console: Console | None) -> RunPlan:
    """Plan the first point that is a config: what is wrong with the base is said now, and its tokens are in the cache.

    The plan's tokenized splits are those of every trial.
    """
    plan = TrainingWrapper(space.trial_config(config, space.first_valid_point(config)), console=console).plan()
    if plan.processes.count > 1:
        raise ConfigurationError(
            f"a sweep trains each trial in one process, found {plan.processes.count}. Start the same command several "
            "times instead, without torchrun or accelerate launch: the trials are shared."
        )
    if plan.validation is None:
        raise ConfigurationError(
            "sweep.metric: trials are judged by their validation loss, and there are no validation rows; give "
            "data.validation or data.val_ratio."
        )
    if config.sweep.pruner != "none" and _count_validations(plan) < 2:
        logger.warning("sweep.pruner: a run validates once, at its end, so none is pruned; set training.eval_steps")
    return plan


def _count_validations(plan: RunPlan) -> int:
    every = plan.config.training.eval_steps or plan.schedule.steps_per_epoch
    return math.ceil(plan.schedule.total_steps / every)


def _explain_resume(error: BaseException) -> BaseException:
    if not isinstance(error, InterruptedRunError):
        return error
    return InterruptedRunError(
        f"{error} Start the same command again: the sweep goes on with this trial.", error.exit_code - 128
    )
