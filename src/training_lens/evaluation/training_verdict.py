"""The losses of a run from its journal, and the verdict at the end of training, from its own validation."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from training_lens.errors import CheckpointError
from training_lens.evaluation.verdict import LEAST_CHANGE, Outcome, Remark, Verdict
from training_lens.runs.metrics_log import read_logged_values
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import pluralize
from training_lens.utils.integrity import read_sealed
from training_lens.utils.logging import get_logger

MORE_ROWS = "validation rows: data.validation=FILE or data.val_ratio=0.1 in the next run, or rows given to compare."
FAR_BELOW = 0.5  # training loss over the loss of other rows
LEAST_GAP = 0.05  # of the base's loss: the gap between both is then too small to matter
LEAST_RISE = 0.02  # share of the best validation loss; a smaller rise is ignored


@dataclass(frozen=True)
class TrainingRecord:
    """Losses in nats per supervised token; None where they were not measured.

    `best_loss` is the validation loss of the saved adapter, after `best_step`; `final_loss` that of the last
    validation. `first_train_loss` and `late_train_loss` are medians over the first and the last tenth of the steps.
    `validations` counts those after step 0, `rows` their rows. `broken_steps` counts steps with a non-finite loss.
    """

    steps: int
    first_train_loss: float | None = None
    late_train_loss: float | None = None
    base_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    final_loss: float | None = None
    validations: int = 0
    rows: int | None = None
    broken_steps: int = 0

    def has_rising_loss(self) -> bool:
        """Whether the validation loss has risen since its best."""
        if self.best_loss is None or self.final_loss is None:
            return False
        return self.final_loss > (1 + LEAST_RISE) * self.best_loss

    def is_far_below(self, loss: float) -> bool:
        """Whether the training loss ends far below this loss of other rows."""
        if self.late_train_loss is None or loss - self.late_train_loss < LEAST_GAP * (self.base_loss or 0.0):
            return False
        return self.late_train_loss < FAR_BELOW * loss

    def describe_gap(self, loss: float) -> str:
        """A training loss that ends far below this loss of other rows, which gained nevertheless."""
        return (
            f"The training loss ends at {self.late_train_loss:.4f}, far below {loss:.4f} on other rows: rows "
            "seen again are memorized, or these other rows are of another kind. Exact answers on training rows decide "
            "it (compare with the training file as data.validation)."
        )


def read_training_record(run: RunFolder) -> TrainingRecord:
    """The record of a run from its metrics.jsonl and data.json, finished or not."""
    try:
        rows = run.read_metadata("data.json")["validation_examples"]
    except (CheckpointError, KeyError, TypeError):
        rows = None
    rows = rows if isinstance(rows, int) else None
    trained = [loss for (loss,) in read_logged_values(run, "step", "loss")]
    steps = [int(step) for (step,) in read_logged_values(run, "step", "step")]
    base = [loss for (loss,) in read_logged_values(run, "base", "loss")]
    validated = read_logged_values(run, "validation", "step", "loss")
    return build_training_record(steps, trained, base[0] if base else None, validated, rows)


def build_training_record(
    steps: Sequence[int],
    trained: Sequence[float],
    base: float | None,
    validated: Sequence[Sequence[float]],
    rows: int | None = None,
) -> TrainingRecord:
    """The record from all steps, the finite losses of those `trained`, and (step, loss) of each validation after 0."""
    tenth = max(1, len(trained) // 10)
    best = min(validated, key=lambda pair: pair[1], default=None)
    return TrainingRecord(
        steps=max(steps, default=0),
        first_train_loss=median(trained[:tenth]) if trained else None,
        late_train_loss=median(trained[-tenth:]) if trained else None,
        base_loss=base if base is None or math.isfinite(base) else None,
        best_loss=best[1] if best else None,
        best_step=int(best[0]) if best else None,
        final_loss=validated[-1][1] if validated else None,
        validations=len(validated),
        rows=rows,
        broken_steps=len(steps) - len(trained),
    )


def assess_training(record: TrainingRecord, run: str = "") -> Verdict:
    """The verdict from the run's validation losses: means without an interval, of which the best is selected.

    The next command names `run`, its folder, if there is one.
    """
    compare = f"training-lens compare --run {shlex.quote(run)}" if run else ""
    remarks = tuple(_training_remarks(record))
    if record.best_loss is None or record.base_loss is None:
        command = f"{compare} data.validation=FILE" if compare and record.best_loss is None else compare
        sentence = _write_inconclusive(record)
        return Verdict("inconclusive", sentence, "training", remarks=remarks, decide=MORE_ROWS, next_command=command)
    change = record.best_loss - record.base_loss
    outcome: Outcome = "better" if change < 0 else "worse"
    if abs(change) < LEAST_CHANGE * record.base_loss:
        outcome = "no difference"
    return Verdict(
        outcome,
        _write_sentence(outcome, record, change),
        "training",
        "loss",
        change,
        rows=record.rows or 0,
        remarks=remarks,
        next_command=compare,
    )


def _write_sentence(outcome: Outcome, record: TrainingRecord, change: float) -> str:
    assert record.best_loss is not None and record.base_loss is not None
    rows = f" over {pluralize(record.rows, 'row')}" if record.rows else ""
    how_far = f"That is one mean{rows} without an interval"
    if record.validations > 1:
        how_far += f", the best of {record.validations} validations"
    result = {
        "better": "Better than its base",
        "worse": "Worse than its base",
        "no difference": "No difference that matters from its base",
    }[outcome]
    return (
        f"{result}, as far as the validation loss tells: {record.best_loss:.4f} (step {record.best_step}) against "
        f"{record.base_loss:.4f}, {change:+.4f}. {how_far}."
    )


def _write_inconclusive(record: TrainingRecord) -> str:
    if record.best_loss is not None:
        return f"Inconclusive: the validation loss is {record.best_loss:.4f}; that of the base was not measured."
    trained = ""
    if record.first_train_loss is not None and record.late_train_loss is not None:
        fell = "fell" if record.late_train_loss < record.first_train_loss else "did not fall"
        trained = f" Its training loss {fell}, from {record.first_train_loss:.4f} to {record.late_train_loss:.4f}."
    return f"Inconclusive: nothing was validated, so how it does on other rows than its own is not known.{trained}"


def _training_remarks(record: TrainingRecord) -> Iterator[Remark]:
    if record.broken_steps:
        yield Remark("nonfinite", "problem", f"{record.broken_steps} steps had a loss that is no finite number.")
    best, base = record.best_loss, record.base_loss
    if best is None or record.final_loss is None:
        return
    if record.has_rising_loss():
        sentence = f"After step {record.best_step} the validation loss rose, to {record.final_loss:.4f} at the end"
        if record.is_far_below(record.final_loss):
            fell = f"the training loss fell to {record.late_train_loss:.4f}"
            sentence += f", while {fell}: the training rows were memorized"
        yield Remark("validation_rises", "note", f"{sentence}. What was kept is step {record.best_step}.")
    elif record.is_far_below(best) and base is not None and best >= base:
        sentence = (
            f"The training loss fell to {record.late_train_loss:.4f}, far below the validation loss: the training "
            "rows were memorized, and other rows gained nothing."
        )
        yield Remark("memorized", "warning", sentence)
    elif record.is_far_below(best):
        yield Remark("train_gap", "note", record.describe_gap(best))


def is_run_folder(source: str) -> bool:
    """Whether the source of a session is a run's folder."""
    return (Path(source) / "metadata").is_dir()


logger = get_logger(__name__)


def read_comparison_verdict(run: RunFolder) -> Verdict | None:
    """The verdict of the run's `compare`; None without one, or where the run was trained further since."""
    path = run.reports / "compare.json"
    if not path.is_file():
        return None
    try:
        report = read_sealed(path)
        steps = run.read_metadata("summary.json").get("steps", 0)
        if "verdict" not in report or report.get("steps", steps) != steps:
            return None  # written before verdicts existed, or before the run was resumed
        return Verdict.from_json(report["verdict"])
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s has no valid verdict (%s): run training-lens compare again", path, error)
        return None
