"""One run from its config to its saved adapter: plans, assembles, trains, keeps the record."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

import training_lens
from training_lens.config.schema import TrainingConfig
from training_lens.errors import CheckpointError, InterruptedRunError, PrunedRunError
from training_lens.integrations.configured import asked_for
from training_lens.models.adapters import ParameterCount, count_parameters, describe
from training_lens.models.factory import load_model
from training_lens.models.stored import base_record
from training_lens.training.assembly import build_trainer, memory_watched
from training_lens.training.callbacks import Callback, LogLines, MetricsCollector, ProgressBar, progress_columns
from training_lens.training.checkpoints import ADAPTER, CheckpointManager, TrainingState
from training_lens.training.lens import LensCallback, lens_of, look_back
from training_lens.training.planning import RunPlan, plan_run, with_rows_as_files
from training_lens.training.tracking import Build, tracked
from training_lens.training.trainer import Trainer
from training_lens.utils.devices import get_device, peak_bytes
from training_lens.utils.files import require_writable, whole_folder, write_json
from training_lens.utils.formatting import format_count
from training_lens.utils.logging import TrainingLogger, get_logger, quiet_libraries
from training_lens.utils.notebooks import notebook_console
from training_lens.utils.progress import Progress, bars
from training_lens.utils.runs import RunFolder, new_run_id, runs_folder

logger = get_logger(__name__)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "pyarrow", "numpy")


@dataclass(frozen=True)
class TrainingSummary:
    """What metadata/summary.json holds and `train --json` prints. Losses in nats per supervised token.

    `validation_loss` is that of the saved adapter (the best validated one, of step `adapter_step`).
    `lens_seconds` is the time spent capturing; `estimate` the prediction made before the run, null where none was.
    """

    run_dir: str
    status: str
    steps: int = 0
    epochs: float = 0.0
    train_loss: float | None = None
    validation_loss: float | None = None
    base_validation_loss: float | None = None
    supervised_tokens: int = 0
    tokens: int = 0
    tokens_per_second: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    adapter_step: int = 0
    lens_seconds: float = 0.0
    estimate: dict[str, float] | None = None

    def _repr_html_(self) -> str | None:
        """In a notebook, the run's card; its numbers alone (None) where the folder is gone by then."""
        from training_lens.analysis.run import Run

        try:
            return Run(self.run_dir)._repr_html_()
        except CheckpointError:
            return None


class TrainingWrapper:
    """Trains what a config describes.

    Args:
        config: paths or in-memory rows, a model, and everything else at its default.
        console: where progress bars go; None: below the cell in a notebook, and nowhere else.
        callbacks: your own watchers of the loop, after the built-in ones.
        integrations: your own trackers, in Python: classes, or functions that make one for a run.

    Example:
        summary = TrainingWrapper(TrainingConfig(data={"train": [{"question": "...", "answer": "..."}]})).train()
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        console: Console | None = None,
        callbacks: tuple[Callback, ...] = (),
        integrations: tuple[Build, ...] = (),
    ) -> None:
        quiet_libraries()
        self._config, self._console = config, console or notebook_console()
        self._callbacks, self._integrations = callbacks, integrations

    def plan(self) -> RunPlan:
        """What `train` would do: data read and tokenized, steps laid out. Loads no weights, trains nothing.

        Raises:
            TrainingLensError: anything that would keep `train` from starting.
        """
        output = self._config.output
        if output.run_id:
            RunFolder(runs_folder(output.base_output_dir, output.experiment_name) / output.run_id).require_new()
        return self._plan()

    def _plan(self) -> RunPlan:
        """The plan, whether the run is there already (to go on with it) or not."""
        asked_for(self._config)  # a tracker that cannot be imported is wrong usage, and found before anything starts
        base = Path(self._config.output.base_output_dir)
        require_writable(base, "output.base_output_dir")
        return plan_run(with_rows_as_files(self._config, base / "cache" / "rows"), Progress(self._console))

    def train(self) -> TrainingSummary:
        """Train from the start in a new run folder, and save adapter, tokenizer and metadata in it.

        Raises:
            TrainingLensError: see its subclasses; the run folder then says `failed`, `interrupted` or `pruned`.
        """
        plan = self.plan()
        output = plan.config.output
        run_id = plan.processes.from_main(output.run_id or new_run_id())
        run = RunFolder(runs_folder(output.base_output_dir, output.experiment_name) / run_id)
        if plan.processes.is_main:
            run.create()
        with _alone(run, plan):
            if plan.processes.is_main:
                self._write_metadata(run, plan.config.resolved(output={"run_id": run_id}), plan)
            plan.processes.wait()
            return self._train(run, plan, resume=False)

    @classmethod
    def resume(
        cls,
        run: RunFolder,
        changes: Mapping[str, dict[str, Any]] | None = None,
        *,
        console: Console | None = None,
        callbacks: tuple[Callback, ...] = (),
        integrations: tuple[Build, ...] = (),
    ) -> TrainingSummary:
        """Go on with an unfinished run after its newest intact checkpoint, exactly as if it had not stopped.

        Args:
            changes: what this process sets over the run's config, by section: keys that change no result, such as
                `{"model": {"device": "cpu"}}`.

        Raises:
            CheckpointError: the run is finished, its data changed since, or another process is training it.
        """
        if run.status == "finished":
            raise CheckpointError(f"the run {run.run_id} is finished; there is nothing to resume. It is in {run.root}.")
        run.require_free()  # before the data is read; the processes of one run all pass here before one of them locks
        config = TrainingConfig.model_validate(run.read_metadata("config.json")).resolved(**(changes or {}))
        wrapper = cls(config, console=console, callbacks=callbacks, integrations=integrations)
        plan = wrapper._plan()
        recorded = run.read_metadata("data.json")["fingerprint"]
        if recorded != plan.fingerprint:
            raise CheckpointError(
                f"the training data of {run.run_id} is no longer what it was: a file, the tokenizer or this program "
                "changed since. Put the old ones back to resume, or start a new run."
            )
        with _alone(run, plan):
            return wrapper._train(run, plan, resume=True)

    def _train(self, run: RunFolder, plan: RunPlan, resume: bool) -> TrainingSummary:
        if plan.processes.is_main:
            _write_summary(run, TrainingSummary(str(run.root), "running"))
        with TrainingLogger(run.logs / "run.log"), self._tracked(run, plan), memory_watched(plan.config):
            logger.debug("training-lens %s, run %s", training_lens.__version__, run.run_id)
            trainer, parameters = self._assemble(run, plan)
            if plan.processes.is_main and not resume:
                write_json(run.base_record, base_record(plan.config.model))  # a hub's weights are there only now
            try:
                state = trainer.fit(resume)
                if plan.processes.is_main:
                    self._save_artifacts(run, plan, trainer, state)
            except BaseException as error:
                logger.debug("the run ends: %s", error, exc_info=True)
                if plan.processes.is_main:
                    _write_summary(run, _summarize(run, _status_after(error), trainer, parameters))
                raise
            summary = _summarize(run, "finished", trainer, parameters)
            if plan.processes.is_main:
                _write_summary(run, summary)
                if plan.config.lens.enabled and plan.config.lens.report:
                    look_back(run)
            return summary

    def _tracked(self, run: RunFolder, plan: RunPlan) -> AbstractContextManager[None]:
        """The run's integrations, which its main process has for all of them."""
        return tracked(run, self._integrations) if plan.processes.is_main else nullcontext()

    def _assemble(self, run: RunFolder, plan: RunPlan) -> tuple[Trainer, ParameterCount]:
        """The model with its adapter, and the loop around it."""
        config, device = plan.config, plan.processes.device
        trainer = build_trainer(
            plan,
            load_model(config.model, device, plan.precision),
            CheckpointManager(run.checkpoints, plan.fingerprint),
            self._watchers(run, plan) if plan.processes.is_main else self._callbacks,
        )
        parameters = count_parameters(trainer.model)
        logger.info(
            "%s: %s of %s parameters train (%.2f %%) on %s in %s",
            describe(config.peft),
            format_count(parameters.trainable), format_count(parameters.total),
            100 * parameters.share, device, plan.precision,
        )  # fmt: skip
        return trainer, parameters

    def _watchers(self, run: RunFolder, plan: RunPlan) -> tuple[Callback, ...]:
        every = plan.config.training.logging_steps
        watchers: list[Callback] = [MetricsCollector(run.metrics), LogLines(every)]
        if drawn := bars(self._console, *progress_columns()):
            watchers.append(ProgressBar(drawn))
        if lens := lens_of(plan, run):
            watchers.append(lens)
        return (*watchers, *self._callbacks)

    def _write_metadata(self, run: RunFolder, config: TrainingConfig, plan: RunPlan) -> None:
        write_json(run.metadata / "config.json", config.model_dump())
        write_json(run.metadata / "data.json", plan.data_report())
        if config.data.val_ratio and plan.validation is not None:
            held_out = [plan.validation.example_id(i) for i in range(len(plan.validation))]
            write_json(run.metadata / "held_out.json", held_out)
        write_json(run.metadata / "environment.json", _environment(config))
        _write_summary(run, TrainingSummary(str(run.root), "running"))

    def _save_artifacts(self, run: RunFolder, plan: RunPlan, trainer: Trainer, state: TrainingState) -> None:
        """artifacts/adapter from the best checkpoint (the last where nothing was validated), and the tokenizer."""
        best = trainer.checkpoints.best_or_last(state) / ADAPTER
        with whole_folder(run.adapter) as folder:
            for file in best.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        with whole_folder(run.tokenizer) as folder:
            plan.tokenizer.save_pretrained(str(folder))


def _alone(run: RunFolder, plan: RunPlan) -> AbstractContextManager[None]:
    """The run's lock, which its main process holds for all of them."""
    return run.held() if plan.processes.is_main else nullcontext()


def _status_after(error: BaseException) -> str:
    if isinstance(error, PrunedRunError):
        return "pruned"
    return "interrupted" if isinstance(error, InterruptedRunError | KeyboardInterrupt) else "failed"


def _summarize(run: RunFolder, status: str, trainer: Trainer, parameters: ParameterCount) -> TrainingSummary:
    state = trainer.state
    validated = state.best_step > 0
    return TrainingSummary(
        run_dir=str(run.root),
        status=status,
        steps=state.step,
        epochs=state.step / trainer.schedule.steps_per_epoch,
        train_loss=state.loss_sum / state.supervised_tokens if state.supervised_tokens else None,
        validation_loss=state.best_loss if validated else None,
        base_validation_loss=state.base_validation_loss,
        supervised_tokens=state.supervised_tokens,
        tokens=state.tokens,
        tokens_per_second=state.tokens / state.seconds if state.seconds else None,
        seconds=state.seconds,
        peak_bytes=peak_bytes(trainer.processes.device),
        trainable_parameters=parameters.trainable,
        total_parameters=parameters.total,
        adapter_step=state.best_step if validated else state.step,
        lens_seconds=sum(c.seconds for c in trainer.callbacks if isinstance(c, LensCallback)),
    )


def _write_summary(run: RunFolder, summary: TrainingSummary) -> None:
    write_json(run.metadata / "summary.json", asdict(summary))


def _environment(config: TrainingConfig) -> dict[str, Any]:
    """What the run ran on: versions, platform, device, threads. Nothing of the environment variables."""
    import torch

    return {
        "training_lens": training_lens.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": str(get_device(config.model.device)),
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }
