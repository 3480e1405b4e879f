"""The results of a sweep: its trials, best first, and the importance of each key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from training_lens.sweeps.search_strategies import build_study
from training_lens.sweeps.space import Space
from training_lens.sweeps.trials import first_number, is_default, is_lost, run_id

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
STATE_ORDER = ("finished", "pruned", "running", "stopped", "failed")
BEST_SHARE = 0.25  # share of the trials that count as good for the importances
MINIMUM_TRIALS = 4  # finished trials that the importances need


@dataclass(frozen=True)
class TrialRow:
    """One trial. `validation_loss` is in nats per supervised token; for a pruned trial, the lowest so far.

    `state` is finished, pruned, running, stopped (its process ended; the next start resumes it) or failed. `params` are
    config values by dotted key; `seconds` is the training time; `run_dir` is on the machine that ran the trial.
    `is_default` marks the trial with the base config's own settings.
    """

    trial: int
    state: str
    validation_loss: float | None
    params: dict[str, Any]
    seconds: float | None
    run_id: str
    run_dir: str | None
    error: str | None
    is_default: bool = False


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a study, best first, and the importance of each key (shares of 1; empty with few trials)."""

    study: str
    metric: str
    rows: tuple[TrialRow, ...]
    importances: dict[str, float]

    @property
    def best(self) -> TrialRow | None:
        """The finished trial with the lowest loss, or None."""
        return self.rows[0] if self.rows and self.rows[0].state == "finished" else None

    def count_trials(self, state: str) -> int:
        """The number of trials in this state."""
        return sum(row.state == state for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Plain values, including the rows."""
        return asdict(self)


def build_leaderboard(study: str, metric: str, trials: Sequence[FrozenTrial], space: Space) -> Leaderboard:
    """The leaderboard of a study's current trials."""
    rows = sorted((build_row(trial, space) for trial in trials), key=_sort_key)
    return Leaderboard(study, metric, tuple(rows), compute_importances(trials))


def build_row(trial: FrozenTrial, space: Space) -> TrialRow:
    """A trial as a row of the leaderboard."""
    facts = trial.user_attrs
    return TrialRow(
        trial=first_number(trial),
        state="stopped" if is_lost(trial) else STATES[trial.state],
        validation_loss=trial.value,
        params=facts["default"] if is_default(trial) else space.config_values(trial.params),
        seconds=facts.get("seconds"),
        run_id=run_id(trial),
        run_dir=facts.get("run_dir"),
        error=facts.get("error"),
        is_default=is_default(trial),
    )


def _sort_key(row: TrialRow) -> tuple[int, float, int]:
    return STATE_ORDER.index(row.state), math.inf if row.validation_loss is None else row.validation_loss, row.trial


def compute_importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """How much each key decides whether a trial is among the best quarter, as shares of 1, largest first.

    PED-ANOVA (arXiv 2304.10255): the Pearson divergence between a key's distribution in the best quarter of the
    finished trials and in all of them. Pruned trials are left out. Rough with few trials; empty with fewer than four
    or if all losses are equal.
    """
    from optuna.importance import (
        PedAnovaImportanceEvaluator,
        get_param_importances,
    )  # takes a second: it imports sklearn

    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.params]
    if len(finished) < MINIMUM_TRIALS or len({trial.value for trial in finished}) < 2:
        return {}
    return get_param_importances(
        build_study(finished), evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    )
