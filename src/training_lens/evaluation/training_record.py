"""The losses of a run, from its journal: what the end of training and a comparison know of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from training_lens.errors import CheckpointError
from training_lens.runs.metrics_log import read_logged_values
from training_lens.runs.run_folder import RunFolder

FAR_UNDER = 0.5  # training loss over that of other rows
LEAST_RISE = 0.02  # of the best validation loss: less is nothing to act on


@dataclass(frozen=True)
class TrainingRecord:
    """Losses in nats per supervised token; None where they were not measured.

    `best_loss` is that of the adapter that was kept, after `best_step`; `final_loss` the last validation's. `first` and
    `late_train_loss` are medians of the first and the last tenth of the steps. `validations` counts those after step 0,
    `rows` the rows that they are means over. `broken_steps` counts steps whose loss is no finite number.
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
        """Whether the training loss ends far under the loss of other rows."""
        return self.late_train_loss is not None and self.late_train_loss < FAR_UNDER * loss


def read_training_record(run: RunFolder) -> TrainingRecord:
    """What metrics.jsonl and data.json of a run tell, however far it came."""
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
    """From plain values.

    Args:
        steps: all of them.
        trained: the finite losses of the steps.
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
