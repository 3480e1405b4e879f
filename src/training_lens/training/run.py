"""One run from its config to its saved adapter: plan, train, and keep its record."""

from __future__ import annotations

import errno
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata
from logging import DEBUG, INFO
from pathlib import Path
from typing import Any

from rich.console import Console

from training_lens._version import __version__
from training_lens.analysis.run_reader import Run
from training_lens.config.run_config import RESUME_KEYS, locate_outputs, open_run_config, remember_consent
from training_lens.config.schema import TrainingConfig
from training_lens.display.progress import Progress, create_bars, notebook_console
from training_lens.errors import InterruptedRunError, TrainingLensError
from training_lens.integrations.courier import IntegrationFactory, send_while_training
from training_lens.integrations.integration_specs import list_integrations
from training_lens.models.adapters import ParameterCount, count_parameters, describe_adapter
from training_lens.models.base_files import save_tokenizer
from training_lens.models.base_record import base_record, check_base, require_local_folder
from training_lens.models.fast.install import uninstall_kernels
from training_lens.models.unsloth_backend import load_unsloth_model
from training_lens.runs.run_folder import RunFolder, new_run_id, runs_folder
from training_lens.training.adapted_base import adapt_base
from training_lens.training.histograms import HistogramWriter
from training_lens.training.kept_states import StateKeeper
from training_lens.training.lens_callback import build_capture_callback, write_lens_report
from training_lens.training.live_findings import LiveFindings
from training_lens.training.loop.callbacks import (
    WIDE,
    Callback,
    LogLines,
    MetricsCollector,
    ProgressBar,
    progress_columns,
)
from training_lens.training.loop.checkpoint_manager import ADAPTER, CheckpointManager, TrainingState
from training_lens.training.loop.memory_budget import explain_out_of_memory
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan, plan_run, write_rows_as_files
from training_lens.training.preflight.check_plan import check_plan, log_findings, write_findings
from training_lens.training.preflight.first_steps import FirstStepsCheck
from training_lens.training.prompt_swaps import PromptSwapCheck
from training_lens.training.resume import (
    check_schedule,
    read_global_batch,
    require_same_tokens,
    require_unfinished,
    select_changes,
)
from training_lens.training.run_processes import (
    follow_passes,
    lock_run,
    log_name,
    require_shared_folder,
)
from training_lens.training.samples import SampleWriter
from training_lens.training.step_costs import EstimateCallback
from training_lens.training.summary import TrainingSummary, status_after_error, summarize_run, write_summary
from training_lens.utils.devices import get_device
from training_lens.utils.files import atomic_folder, list_files, require_writable
from training_lens.utils.formatting import format_count
from training_lens.utils.integrity import record_hashes, write_sealed
from training_lens.utils.launch import find_launch
from training_lens.utils.logging import TrainingLogger, get_logger, quiet_libraries
from training_lens.utils.machine import PACKAGES

logger = get_logger(__name__)
SHOWN_PATH = 200  # most characters of a path in an error


class TrainingWrapper:
    """Trains what a config describes.

    Args:
        config: paths or in-memory rows, a model, and everything else at its default.
        console: for progress bars; None: below the cell in a notebook, else nowhere.
        callbacks: your own, called after the built-in ones.
        integrations: your own trackers: classes, or functions that build one for a run.

    Example:
        summary = TrainingWrapper(TrainingConfig(data={"train": [{"question": "...", "answer": "..."}]})).train()
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        console: Console | None = None,
        callbacks: tuple[Callback, ...] = (),
        integrations: tuple[IntegrationFactory, ...] = (),
    ) -> None:
        quiet_libraries()
        self._config, self._console = config, console or notebook_console()
        self._callbacks, self._integrations = callbacks, integrations
        self._scratch = ExitStack()  # files that nobody reads, deleted when the run ends

    def plan(self) -> RunPlan:
        """What `train` would do: reads and tokenizes the data and plans the steps, without loading weights.

        Raises:
            TrainingLensError: anything that would keep `train` from starting.
        """
        output = self._config.output
        if output.run_id:
            RunFolder(runs_folder(output.base_output_dir, output.experiment_name) / output.run_id).require_new()
        plan = self._plan_run()
        return replace(plan, findings=check_plan(plan))

    def _plan_run(self, global_batch: int | None = None) -> RunPlan:
        """The plan of a new run, or of one to resume with its own global batch."""
        list_integrations(self._config)  # finds a tracker that cannot be imported before anything starts
        base = Path(self._config.output.base_output_dir)
        require_writable(base, "output.base_output_dir")
        with _explain_file_errors():
            config = write_rows_as_files(self._config, base / "cache" / "rows")
            return plan_run(config, Progress(self._console), global_batch)

    def train(self) -> TrainingSummary:
        """Train in a new run folder, and save adapter, tokenizer and metadata in it.

        Raises:
            TrainingLensError: see its subclasses; the run's status is then `failed`, `interrupted` or `pruned`.
        """
        plan = self.plan()
        output = plan.config.output
        run_id = plan.processes.from_main(output.run_id or new_run_id())
        run = RunFolder(runs_folder(output.base_output_dir, output.experiment_name) / run_id)
        if plan.processes.is_main:
            begun = plan.config.replace_keys(output={"run_id": run_id})
            run.create(lambda folder: self._write_metadata(folder, run.root, begun, plan))
        with lock_run(run, plan):
            plan.processes.wait_for_all()
            require_shared_folder(run, plan.processes)
            return self._train_run(run, plan, resume=False)

    @classmethod
    def resume(
        cls,
        run: RunFolder | Path | str,
        settings: Mapping[str, dict[str, Any]] | None = None,
        *,
        console: Console | None = None,
        callbacks: tuple[Callback, ...] = (),
        integrations: tuple[IntegrationFactory, ...] = (),
    ) -> TrainingSummary:
        """Resume an unfinished run after its newest intact checkpoint, exactly as if it had not stopped.

        Its steps stay the same on any number of processes.

        Args:
            run: a run's folder, or what `Run` takes: its id, or `latest`.
            settings: by section, such as `{"model": {"device": "cpu"}}`. Those of `resume.FREE_KEYS`, which change no
                result, hold for this process; all others must equal the run's.

        Raises:
            CheckpointError: the run is finished, its data changed since, or another process is training it.
            ConfigurationError: settings that differ from the run's; or what the user has not allowed, see
                `run_config.require_consent`.
        """
        run = run if isinstance(run, RunFolder) else Run(run).folder
        require_unfinished(run)
        run.require_free()  # before the data is read: all processes of a run pass here before one locks it
        recorded = open_run_config(run, settings or {}, *RESUME_KEYS)
        config = recorded.replace_keys(**select_changes(run, recorded, settings or {}))
        config = config.replace_keys(output={"base_output_dir": str(locate_outputs(run))})
        check_base(run.base_record, config.model)
        wrapper = cls(config, console=console, callbacks=callbacks, integrations=integrations)
        plan = wrapper._plan_run(read_global_batch(run))
        require_same_tokens(run, plan)
        check_schedule(run, plan.schedule, plan.processes)
        with lock_run(run, plan):
            return wrapper._train_run(run, plan, resume=True)

    def _train_run(self, run: RunFolder, plan: RunPlan, resume: bool) -> TrainingSummary:
        if plan.processes.is_main:
            write_summary(run, TrainingSummary(str(run.root), "running"))
            remember_consent(run.root, plan.config)
        with (
            self._scratch,
            TrainingLogger(run.logs / log_name(plan.processes)),
            send_while_training(run, self._integrations) if plan.processes.is_main else nullcontext(),
            explain_out_of_memory(plan.config),
            plan.processes.explain_lost_process(f"Resume it: {run.resume_command}"),
        ):
            logger.debug("training-lens %s, run %s", __version__, run.run_id)
            if plan.processes.is_main and not resume:
                log_findings(plan.findings)
                write_findings(plan.findings, run.reports)
            recorded = run.read_metadata("data.json")["fingerprint"] if resume else None
            trainer, parameters = self._build_trainer(run, plan, recorded)
            if plan.processes.is_main and not run.base_record.is_file():  # weights of a hub are downloaded only now
                write_sealed(run.base_record, base_record(plan.config.model))
            try:
                state = trainer.fit(resume)
                if plan.processes.is_main:
                    self._save_artifacts(run, plan, trainer, state)
            except BaseException as error:
                logger.debug("the run ends: %s", error, exc_info=True)
                if plan.processes.is_main:
                    write_summary(run, summarize_run(run, status_after_error(error), trainer, parameters))
                if isinstance(error, InterruptedRunError):
                    raise InterruptedRunError(
                        f"{error} Resume it: {run.resume_command}", error.signal_number
                    ) from error
                raise
            finally:  # kernels and modules refer to each other, which would keep the weights alive
                uninstall_kernels(trainer.model)
            summary = summarize_run(run, "finished", trainer, parameters)
            if plan.processes.is_main:
                write_summary(run, summary)
                if plan.config.lens.enabled and plan.config.lens.report:
                    write_lens_report(run)
            return summary

    def _build_trainer(
        self, run: RunFolder, plan: RunPlan, fingerprint: str | None = None
    ) -> tuple[Trainer, ParameterCount]:
        """The model with its adapter, and the loop around it.

        Args:
            fingerprint: of the data, as checkpoints record it; None: the plan's.
        """
        config, device = plan.config, plan.processes.device
        is_unsloth = config.model.backend == "unsloth"
        with plan.processes.take_turns() if plan.processes.is_base_sharded else nullcontext():
            model = load_unsloth_model(config, device, plan.precision) if is_unsloth else plan.load_base()
            model = adapt_base(plan, model)
        trainer = Trainer(
            model,
            plan.loop_plan,
            CheckpointManager(run.checkpoints, fingerprint or plan.fingerprint),
            self._build_callbacks(run, plan, fingerprint or plan.fingerprint)
            if plan.processes.is_main
            else (*follow_passes(plan, self._scratch), *self._callbacks, FirstStepsCheck(plan, None)),
        )
        parameters = count_parameters(trainer.model)
        logger.info(
            "%s: %s of %s parameters train (%.2f %%) on %s in %s",
            describe_adapter(config.peft),
            format_count(parameters.trainable), format_count(parameters.total),
            100 * parameters.share, device, plan.precision,
        )  # fmt: skip
        return trainer, parameters

    def _build_callbacks(self, run: RunFolder, plan: RunPlan, fingerprint: str) -> tuple[Callback, ...]:
        every = plan.config.training.logging_steps
        progress_bars = create_bars(self._console, *progress_columns(self._console.width if self._console else WIDE))
        callbacks: list[Callback] = [
            MetricsCollector(run.metrics_file),
            LogLines(every, DEBUG if progress_bars else INFO),
        ]
        if progress_bars:
            callbacks.append(ProgressBar(progress_bars))
        if lens := build_capture_callback(plan, run.lens):
            if plan.config.lens.live or plan.config.lens.stop_on:
                callbacks.append(PromptSwapCheck(lens.lens))  # before the lens, which closes at the end
            callbacks.append(lens)
            if plan.config.lens.keep_states:
                callbacks.append(StateKeeper(run.states, plan.config.lens, lens.lens, fingerprint))
            if plan.config.lens.live or plan.config.lens.stop_on:
                callbacks.append(LiveFindings(run, lens.lens, plan.config.lens.stop_on))
        callbacks.append(EstimateCallback(plan))
        tracking = plan.config.tracking
        is_shown = tracking.has_display or bool(self._integrations)
        if is_shown and tracking.histograms_every:
            callbacks.append(HistogramWriter(run.histograms_file, tracking.histograms_every))
        if tracking.samples and plan.config.model.backend == "unsloth":
            logger.info("tracking.samples: none while unsloth trains; training-lens infer answers afterwards")
        elif tracking.samples:
            callbacks.append(SampleWriter(run.samples_file, plan))
        return (*callbacks, *self._callbacks, FirstStepsCheck(plan, run))

    def _write_metadata(self, run: RunFolder, home: Path, config: TrainingConfig, plan: RunPlan) -> None:
        """Write the first files of a run into a temporary folder that will become `home`."""
        files: dict[str, Any] = {
            "config.json": config.model_dump(),
            "data.json": plan.data_report(),
            "adaptation.json": plan.adaptation.as_json(),
            "environment.json": describe_environment(config),
        }
        if config.data.val_ratio and plan.validation is not None:
            files["held_out.json"] = plan.held_out_ids()
        for name, values in files.items():
            run.write_metadata(name, values)
        write_summary(run, TrainingSummary(str(home), "running"))

    def _save_artifacts(self, run: RunFolder, plan: RunPlan, trainer: Trainer, state: TrainingState) -> None:
        """Save the adapter of the best checkpoint (the last if nothing was validated), and the tokenizer."""
        best = trainer.checkpoints.best_or_last(state) / ADAPTER
        with atomic_folder(run.adapter, existing="replace") as folder:
            for file in best.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        with atomic_folder(run.tokenizer, existing="replace") as folder:
            model = plan.config.model
            save_tokenizer(plan.tokenizer, folder, require_local_folder(model), model.trust_remote_code)
        remember_consent(run.root, plan.config)  # the run holds the tokenizer's code, too
        record_hashes(run.root, [*list_files(run.adapter), *list_files(run.tokenizer)])


@contextmanager
def _explain_file_errors() -> Iterator[None]:
    """Turns unreadable files in the block into expected errors; a full disk stays an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOSPC, errno.EDQUOT):
            raise
        place = str(error.filename or "a file")
        place = place if len(place) <= SHOWN_PATH else f"{place[:SHOWN_PATH]}..."
        raise TrainingLensError(f"{place}: {error.strerror}. Give another path, or make this one readable.") from error


def describe_environment(config: TrainingConfig) -> dict[str, Any]:
    """What the run runs on: versions, platform, device, threads. No environment variables."""
    import torch

    packages = (*PACKAGES, "unsloth") if config.model.backend == "unsloth" else PACKAGES
    return {
        "training_lens": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": str(get_device(config.model.device)),
        "threads": torch.get_num_threads(),
        **({"launch": launch} if (launch := find_launch()) else {}),
        "packages": {name: metadata.version(name) for name in packages},
    }
