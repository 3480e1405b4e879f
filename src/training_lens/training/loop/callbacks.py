"""The callback protocol, and the callbacks that write metrics, log lines and progress bars."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from training_lens.core.row_losses import RowLosses
from training_lens.errors import TrainingError
from training_lens.evaluation.evaluator import LossReport
from training_lens.models.broken_weights import describe_broken_weights
from training_lens.runs.journal import Journal
from training_lens.runs.metrics_log import read_metrics
from training_lens.utils.formatting import format_seconds
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
WIDE, NARROW = 110, 72  # characters: from WIDE on all columns are shown, below NARROW the fewest
ROW_VALUES = ("row_losses", "row_tokens")  # the lens stores them in fewer bytes
FILES_SHOWN = 8  # the losses of more validation files than this go to run.log and metrics.jsonl only


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step. The loss, in nats per supervised token, is over the tokens of this step only.

    `grad_norm`: of the accumulated, unscaled gradients before clipping; `tokens`: without padding. `row_losses` and
    `row_tokens` are those of each of `example_ids`: nats per supervised token before the update, and such tokens.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    supervised_tokens: int
    seconds: float
    example_ids: tuple[str, ...]
    finite: bool
    row_losses: tuple[float, ...] = ()
    row_tokens: tuple[int, ...] = ()

    @property
    def losses_by_row(self) -> RowLosses:
        """The step's rows with their losses."""
        return RowLosses(self.example_ids, self.row_losses, self.row_tokens)


def build_not_finite_error(
    report: StepReport, good: tuple[Path, Any] | None, model: Any, base_loss: float | None = None
) -> TrainingError:
    """The error for a step whose loss or gradient is not finite.

    Args:
        good: the newest intact checkpoint, if there is one.
        model: whose weights are looked at for the cause.
        base_loss: of the base's own validation, if there was one.
    """
    what = "gradient" if math.isfinite(report.loss) else "loss"
    before = f"The last good checkpoint is {good[0]}" if good else "There is no checkpoint before it"
    return TrainingError(
        f"step {report.step}: the {what} is not finite (loss {report.loss}, gradient norm {report.grad_norm}); "
        f"the update was not applied. Examples: {', '.join(report.example_ids)}. {before}. "
        f"{describe_broken_weights(model) or _advise_not_finite(report.step, base_loss)}"
    )


def _advise_not_finite(step: int, base_loss: float | None) -> str:
    """What can be the cause: not the rate before the first update, and not the rows where the base itself fails."""
    if base_loss is not None and not math.isfinite(base_loss):
        return (
            "The base model's own validation loss is not finite either, so neither rows nor rate are the cause: check "
            "the base's files (training-lens doctor --verify), or use training.precision=fp32."
        )
    if step == 1:
        return (
            "No update was made before, so the rate is not the cause: look at these rows and at the base, or use "
            "training.precision=fp32."
        )
    return "Look at these rows, lower training.lr, or use training.precision=fp32."


class Callback:
    """Override what you need; the loop calls its callbacks in order. `trainer` is the running `Trainer`."""

    def on_train_start(self, trainer: Any) -> None:
        """Before the first step; a resumed run continues after `trainer.state.step`."""

    def on_gradients(self, trainer: Any, step: int) -> None:
        """`parameter.grad` holds the gradients of the whole step: accumulated, unscaled, before clipping."""

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        """After the update."""

    def on_evaluate_progress(self, trainer: Any, done: int, total: int) -> None:
        """During a validation: `done` of `total` examples are evaluated."""

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        """After a validation; `base` is true for that of the base model, at step 0."""

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        """After a validation of the validation sample alone, between those of all rows."""

    def on_samples(self, trainer: Any, step: int, answers: Sequence[Mapping[str, Any]], base: bool) -> None:
        """After the fixed prompts were answered: the `samples` of a line of logs/samples.jsonl."""

    def on_finding(self, trainer: Any, finding: Any) -> None:
        """When a live finding arises: a `training_lens.analysis.findings.Finding`; again only after it has cleared."""

    def on_save(self, trainer: Any) -> None:
        """Before a checkpoint is written: write to disk what a run that resumes from it needs."""

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        """After a checkpoint is on disk."""

    def on_train_end(self, trainer: Any) -> None:
        """After the last step, also of a run that stopped early or was interrupted."""

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """After the run failed with `error`."""


class JournalCallback(Callback):
    """Writes to a journal: opens it when training starts, closes it when training ends.

    A resumed run first drops the lines after its checkpoint.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self._journal = Path(path), Journal(Path(path))

    def on_train_start(self, trainer: Any) -> None:
        self._journal.open(after=trainer.state.step)

    def on_train_end(self, trainer: Any) -> None:
        self._journal.close()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self._journal.close()


class MetricsCollector(JournalCallback):
    """Writes metrics.jsonl, one line per step and per validation; `read` reads it back."""

    def on_train_start(self, trainer: Any) -> None:
        if self.path.is_file() and trainer.state.step:
            read_metrics(self.path, trainer.state.step)  # warns of lines that a resumed run lacks
        super().on_train_start(trainer)

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        values = {name: value for name, value in asdict(report).items() if name not in ROW_VALUES}
        self._journal.write({"kind": "step", **values})

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        values = {name: value for name, value in vars(report).items() if name != "row_nll"}  # one for each row
        self._journal.write({"kind": "base" if base else "validation", "step": step, **values})

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        rows = len(trainer.validation_sample.positions)
        values = {"loss": report.loss, "error": report.error, "supervised_tokens": report.supervised_tokens}
        self._journal.write({"kind": "validation_sample", "step": step, "rows": rows, **values})

    @staticmethod
    def read(path: Path | str) -> list[dict[str, Any]]:
        """The lines of a metrics.jsonl, without a last line that a kill cut short."""
        return read_metrics(Path(path))


class LogLines(Callback):
    """Logs losses and validations.

    Args:
        every: steps between two lines.
        level: of the lines of steps: INFO where no progress bar shows them, else DEBUG.
    """

    def __init__(self, every: int, level: int = logging.DEBUG) -> None:
        self._every, self._level = every, level
        self._recent: list[StepReport] = []

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        self._recent = [*self._recent[-19:], report]
        if report.step % self._every == 0 or report.step == 1:
            total, seconds = trainer.schedule.total_steps, sum(r.seconds for r in self._recent)
            logger.log(
                self._level, "step %d/%d: loss %.4f, gradient norm %.3g, lr %.3g, %s tokens/s, ETA %s",
                report.step, total, report.loss, report.grad_norm, report.lr,
                f"{sum(r.tokens for r in self._recent) / seconds:,.0f}" if seconds else "-",
                format_seconds((total - report.step) * seconds / len(self._recent)),
            )  # fmt: skip

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        who = "base" if base else f"step {step}"
        logger.info("%s: validation loss %.4f over %d supervised tokens", who, report.loss, report.supervised_tokens)
        level = logging.INFO if len(report.by_file) <= FILES_SHOWN else logging.DEBUG
        for file, loss in report.by_file.items():
            logger.log(level, "%s:   %.4f on %s", who, loss, file)

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        rows = len(trainer.validation_sample.positions)
        logger.info("step %d: validation loss %.4f on the sample of %d rows", step, report.loss, rows)

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        logger.debug("checkpoint %s", folder)


def progress_columns(width: int = WIDE) -> tuple[ProgressColumn, ...]:
    """The columns of a `ProgressBar`; a narrow window shows step, loss and the remaining time only.

    Args:
        width: of the window, in characters.
    """
    columns: dict[ProgressColumn, int] = {  # column -> the least width that shows it
        TextColumn("{task.description}", markup=False): 0,
        BarColumn(40 if width >= WIDE else 10): NARROW,
        MofNCompleteColumn(): 0,
        TextColumn("{task.fields[status]}", markup=False): 0,
        TextColumn("{task.fields[speed]}", markup=False): NARROW,
        TimeElapsedColumn(): WIDE,
        TextColumn("ETA", markup=False): 0,
        TimeRemainingColumn(): 0,
    }
    return tuple(column for column, least in columns.items() if width >= least)


class ProgressBar(Callback):
    """Shows step, loss, tokens per second and remaining time; a second bar during a validation.

    Args:
        bars: with `progress_columns`, not started yet.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._recent: list[StepReport] = []
        self._validation: TaskID | None = None

    def on_train_start(self, trainer: Any) -> None:
        self._bars.start()
        self._task = self._bars.add_task(
            "training", total=trainer.schedule.total_steps, completed=trainer.state.step, status="", speed=""
        )

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        self._recent = [*self._recent[-19:], report]
        speed = sum(r.tokens for r in self._recent) / sum(r.seconds for r in self._recent)
        loss = sum(r.loss for r in self._recent) / len(self._recent)
        self._bars.update(self._task, completed=report.step, status=f"loss {loss:.3f}", speed=f"{speed:,.0f} tokens/s")

    def on_evaluate_progress(self, trainer: Any, done: int, total: int) -> None:
        if self._validation is None:
            self._validation = self._bars.add_task("validating", total=total, status="", speed="")
        self._bars.update(self._validation, completed=done)

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        self._end_validation()

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        self._end_validation()

    def _end_validation(self) -> None:
        if self._validation is not None:
            self._bars.remove_task(self._validation)
            self._validation = None

    def on_train_end(self, trainer: Any) -> None:
        self._bars.stop()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self._bars.stop()
