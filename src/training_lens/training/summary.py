"""The summary of a run: metadata/summary.json, which `train --json` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from training_lens.errors import CheckpointError, InterruptedRunError, PrunedRunError
from training_lens.models.adapters import ParameterCount
from training_lens.runs.run_folder import RunFolder
from training_lens.training.lens_callback import CaptureCallback
from training_lens.training.loop.trainer import Trainer
from training_lens.training.step_costs import EstimateCallback
from training_lens.utils.devices import peak_bytes
from training_lens.utils.integrity import write_sealed


@dataclass(frozen=True)
class TrainingSummary:
    """The content of metadata/summary.json. Losses are in nats per supervised token.

    `micro_batch_tokens`: most tokens in one pass at the end, as configured or as memory held.
    `validation_loss`: of the saved adapter, the best validated one, of step `adapter_step`.
    `stopped_by`: the code of the finding that stopped the run (lens.stop_on), or null.
    `lens_seconds`: spent on capturing; `estimate`: what the run expected of all its steps after
    the fifth (see `OwnEstimate`), to be compared with `seconds` and `peak_bytes`; null for shorter runs.
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
    micro_batch_tokens: int | None = None
    lens_seconds: float = 0.0
    estimate: dict[str, float] | None = None
    stopped_by: str | None = None

    def _repr_html_(self) -> str | None:
        """The run's card, in a notebook; None, which shows the plain values, if the folder is gone."""
        from training_lens.analysis.run_reader import Run

        try:
            return Run(self.run_dir)._repr_html_()
        except CheckpointError:
            return None


def status_after_error(error: BaseException) -> str:
    """The status of a run that an error ended: pruned, interrupted or failed."""
    if isinstance(error, PrunedRunError):
        return "pruned"
    return "interrupted" if isinstance(error, InterruptedRunError | KeyboardInterrupt) else "failed"


def summarize_run(run: RunFolder, status: str, trainer: Trainer, parameters: ParameterCount) -> TrainingSummary:
    """The summary of a run so far; the validation loss is the best one, whose adapter is saved."""
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
        micro_batch_tokens=state.micro_batch_tokens,
        stopped_by=trainer.stopped_by,
        estimate=next(
            (asdict(c.estimate) for c in trainer.callbacks if isinstance(c, EstimateCallback) if c.estimate), None
        ),
        lens_seconds=sum(c.capture_seconds for c in trainer.callbacks if isinstance(c, CaptureCallback)),
    )


def write_summary(run: RunFolder, summary: TrainingSummary) -> None:
    """Write metadata/summary.json, replacing the previous one."""
    write_sealed(run.metadata / "summary.json", asdict(summary))
