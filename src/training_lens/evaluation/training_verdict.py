"""The verdict at the end of training, from the run's own validation."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from training_lens.evaluation.training_record import TrainingRecord
from training_lens.evaluation.verdict import LEAST_CHANGE, Outcome, Remark, Verdict, count_rows

MORE_ROWS = "validation rows: data.validation=FILE or data.val_ratio=0.1 in the next run, or rows given to compare."


def assess_training(record: TrainingRecord, run: str = "") -> Verdict:
    """The verdict from the run's validation losses: means without an interval, of which the best is selected.

    Args:
        run: its folder, for the next command; empty if there is none.
    """
    compare = f"training-lens compare --run {shlex.quote(run)}" if run else ""
    remarks = tuple(_training_remarks(record))
    if record.best_loss is None or record.base_loss is None:
        command = f"{compare} data.validation=FILE" if compare and record.best_loss is None else compare
        return Verdict(
            "inconclusive",
            _write_inconclusive(record),
            "training",
            remarks=remarks,
            decide=MORE_ROWS,
            next_command=command,
        )
    change = record.best_loss - record.base_loss
    outcome = _find_outcome(change, record.base_loss)
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


def _find_outcome(change: float, base: float) -> Outcome:
    if abs(change) < LEAST_CHANGE * base:
        return "no difference"
    return "better" if change < 0 else "worse"


def _write_sentence(outcome: Outcome, record: TrainingRecord, change: float) -> str:
    assert record.best_loss is not None and record.base_loss is not None
    rows = f" over {count_rows(record.rows)}" if record.rows else ""
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
    if record.best_loss is None or record.final_loss is None:
        return
    if record.has_rising_loss():
        sentence = f"After step {record.best_step} the validation loss rose, to {record.final_loss:.4f} at the end"
        if record.is_far_below(record.final_loss):
            sentence += (
                f", while the training loss fell to {record.late_train_loss:.4f}: the training rows were memorized"
            )
        yield Remark("validation_rises", "note", f"{sentence}. What was kept is step {record.best_step}.")
    elif (
        record.is_far_below(record.best_loss) and record.base_loss is not None and record.best_loss >= record.base_loss
    ):
        sentence = (
            f"The training loss fell to {record.late_train_loss:.4f}, far below the validation loss: the training "
            "rows were memorized, and other rows gained nothing."
        )
        yield Remark("memorized", "warning", sentence)


def is_run_folder(source: str) -> bool:
    """Whether the source of a session is a run's folder."""
    return (Path(source) / "metadata").is_dir()
