"""What a sweep found: its trials, best first, and how much each key mattered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from training_lens.sweeps.proposals import build_study
from training_lens.sweeps.space import Space
from training_lens.sweeps.trials import first_number, is_default, is_lost, run_id

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
STATE_ORDER = ("finished", "pruned", "running", "stopped", "failed")
BEST_SHARE = 0.25  # share of the trials that count as good ones for the importances
MINIMUM_TRIALS = 4  # finished trials: with fewer, nothing can be said of importances


@dataclass(frozen=True)
class TrialRow:
    """One trial. `validation_loss` in nats per supervised token; of a pruned trial, its lowest until then.

    `state` is finished, pruned, running, stopped (its process ended; the next start goes on with it) or failed.
    `params` are values of the config by dotted key; `seconds` are those of training; `run_dir` is on the machine that
    ran it. `is_default`: the trial of the default settings, the base config's own.
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
    """The rows of a study, best first, and the importance of each key (shares of 1; empty with few trials)."""

    study: str
    metric: str
    rows: tuple[TrialRow, ...]
    importances: dict[str, float]

    @property
    def best(self) -> TrialRow | None:
        """The finished trial of the lowest loss, or None."""
        return self.rows[0] if self.rows and self.rows[0].state == "finished" else None

    def count_trials(self, state: str) -> int:
        """How many trials are in this state."""
        return sum(row.state == state for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Plain values, rows included."""
        return asdict(self)


def build_leaderboard(study: str, metric: str, trials: Sequence[FrozenTrial], space: Space) -> Leaderboard:
    """The leaderboard of a study's trials that count."""
    rows = sorted((build_row(trial, space) for trial in trials), key=_sort_key)
    return Leaderboard(study, metric, tuple(rows), compute_importances(trials))


def build_row(trial: FrozenTrial, space: Space) -> TrialRow:
    """A trial as people read it."""
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
    """How much each key decided whether a trial is among the best quarter, as shares of 1, largest first.

    PED-ANOVA (arXiv 2304.10255): the Pearson divergence between a key's distribution in the best quarter of the
    finished trials and in all of them. Pruned trials are left out. With few trials it is rough;
    where all losses are equal, or with fewer than four, there are none.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances  # a second: it brings sklearn

    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.params]
    if len(finished) < MINIMUM_TRIALS or len({trial.value for trial in finished}) < 2:
        return {}
    return get_param_importances(
        build_study(finished), evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    )
