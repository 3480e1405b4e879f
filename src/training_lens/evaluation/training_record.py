"""The losses of a run, read from its journal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from training_lens.errors import CheckpointError
from training_lens.runs.metrics_log import read_logged_values
from training_lens.runs.run_folder import RunFolder

FAR_BELOW = 0.5  # training loss over the loss of other rows
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
        return self.late_train_loss is not None and self.late_train_loss < FAR_BELOW * loss


def read_training_record(run: RunFolder) -> TrainingRecord:
    """The record of a run from its metrics.jsonl and data.json, finished or not."""
    trained = [loss for (loss,) in read_logged_values(run, "step", "loss")]
    steps = [int(step) for (step,) in read_logged_values(run, "step", "step")]
    base = [loss for (loss,) in read_logged_values(run, "base", "loss")]
    validated = read_logged_values(run, "validation", "step", "loss")
    return build_training_record(steps, trained, base[0] if base else None, validated, _validation_rows(run))


def build_training_record(
    steps: Sequence[int],
    trained: Sequence[float],
    base: float | None,
    validated: Sequence[Sequence[float]],
    rows: int | None = None,
) -> TrainingRecord:
    """The record from plain values.

    Args:
        steps: all steps.
        trained: the finite training losses.
        validated: (step, loss) of each validation after step 0.
    """
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


def _validation_rows(run: RunFolder) -> int | None:
    try:
        rows = run.read_metadata("data.json")["validation_examples"]
    except (CheckpointError, KeyError, TypeError):
        return None
    return rows if isinstance(rows, int) else None
