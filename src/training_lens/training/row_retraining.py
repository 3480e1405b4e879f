"""A run trained again without some rows, and without random ones of like length: what both do on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from training_lens.config.run_config import Settings
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.evaluation.evaluator import estimate_error
from training_lens.measures.curves import NORMAL_95
from training_lens.runs.run_folder import RunFolder
from training_lens.training.row_ranking import draw_controls
from training_lens.training.row_replay import RowReplay

CONTROLS = 2  # sets of random rows: two show how much chance alone does


@dataclass(frozen=True)
class RetrainedLosses:
    """Held-out losses in nats per supervised token: of the run, and of its replays without rows.

    `without` leaves out the rows that were asked, each of `controls` as many random ones of like length. `difference`
    is `without` less the mean of the controls, `error` its standard error over held-out rows.
    """

    left_out: int
    rows: int
    whole: float
    without: float
    controls: tuple[float, ...]
    difference: float
    error: float

    @property
    def outcome(self) -> str:
        """better, worse or inconclusive: without these rows, against without random ones."""
        is_chance = min(self.controls) <= self.without <= max(self.controls)
        if is_chance or abs(self.difference) <= NORMAL_95 * self.error:
            return "inconclusive"
        return "better" if self.difference < 0 else "worse"

    def describe(self) -> Iterator[str]:
        """What was measured, a sentence each."""
        random = " and ".join(f"{loss:.4f}" for loss in self.controls)
        yield (
            f"Held-out loss on {self.rows} rows: {self.whole:.4f} as trained, {self.without:.4f} without these "
            f"{self.left_out} rows, {random} without as many random ones of like length."
        )
        half = NORMAL_95 * self.error
        difference = f"{self.difference:+.4f} (95%: {self.difference - half:+.4f} to {self.difference + half:+.4f})"
        if self.outcome == "inconclusive":
            yield f"Inconclusive: the difference of {difference} may be chance. More held-out rows would decide."
        else:
            yield f"The held-out loss is {self.outcome} without these rows than without random ones: {difference}."

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}


class RetrainingWithoutRows:
    """Trains a finished run again, step by step as it was, but for some rows.

    Args:
        ids: the rows to leave out.
        given: the user's consent to code of the run's model, see `open_run_config`.

    Raises:
        CheckpointError, ConfigurationError, AdapterError: the run is not finished or cannot be repeated, it has no
            validation rows, or an id is none of its training rows.
    """

    def __init__(
        self, run: RunFolder, ids: Collection[str], progress: Progress | None = None, given: Settings | None = None
    ) -> None:
        self._replay = RowReplay(run, progress, given)
        if self._replay.plan.validation is None:
            raise ConfigurationError(
                "--retrain compares losses on validation rows, and this run has none. Train with data.validation=FILE "
                "or data.val_ratio=0.1."
            )
        self._validation = self._replay.plan.validation
        self._rows = self._replay.find_rows(ids)
        generator = np.random.Generator(np.random.PCG64(self._replay.plan.config.training.seed))
        self._controls = [draw_controls(self._replay, self._rows, 0, generator) for _ in range(CONTROLS)]

    def describe_cost(self) -> str:
        """What `measure` will train, in one line."""
        return self._replay.describe_cost(2 + CONTROLS)

    def measure(self) -> RetrainedLosses:
        """Replay the run with every row, which must give its adapter bit for bit, and without each set of rows.

        Raises:
            TrainingError: the run does not repeat, see `RowReplay.measure`.
        """
        found = self._replay.measure(self._validation, [self._rows, *self._controls])
        tokens = self._validation.supervised_counts
        whole, (without, *controls) = -found.whole, -found.without
        losses = [float(nll.sum() / tokens.sum()) for nll in (whole, without, *controls)]
        away = without - np.mean(controls, 0)
        difference = float(away.sum() / tokens.sum())
        error = estimate_error(away, tokens)
        error = math.inf if error is None else error  # of one row nothing is known
        return RetrainedLosses(len(self._rows), len(tokens), losses[0], losses[1], tuple(losses[2:]), difference, error)
