"""The results of a sweep: its trials, best first, the importance of each key, and the settings that it recommends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from training_lens.measures.curves import NORMAL_95
from training_lens.sweeps.search_strategies import build_study
from training_lens.sweeps.space import Space
from training_lens.sweeps.trials import BLOCKS, first_number, is_default, is_lost, run_id

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
STATE_ORDER = ("finished", "pruned", "running", "stopped", "failed")
BEST_SHARE = 0.25  # share of the trials that count as good for the importances
MINIMUM_TRIALS = 4  # finished trials that the importances need
MOST_BLOCKS = 256  # of validation rows: the number of loss sums stored with a trial


@dataclass(frozen=True)
class TrialRow:
    """One trial."""

    trial: int
    state: str  # of `STATE_ORDER`; stopped: its process ended, and the next start resumes it
    validation_loss: float | None  # in nats per supervised token; of a pruned trial, the lowest so far
    params: dict[str, Any]  # config values by dotted key
    seconds: float | None  # of training
    run_id: str
    run_dir: str | None  # on its machine
    error: str | None
    is_default: bool = False  # with the base config's own settings
    host: str | None = None  # the machine that ran the trial


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


def build_leaderboard(study: str, metric: str, trials: Sequence[FrozenTrial], space: Space) -> Leaderboard:
    """The leaderboard of a study's current trials."""
    rows = sorted(
        (build_row(trial, space) for trial in trials),
        key=lambda row: (
            STATE_ORDER.index(row.state),
            math.inf if row.validation_loss is None else row.validation_loss,
            row.trial,
        ),
    )
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
        host=facts.get("host"),
    )


def compute_importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """How much each key decides whether a trial is among the best quarter, as shares of 1, largest first.

    PED-ANOVA (arXiv 2304.10255): the Pearson divergence between a key's distribution in the best quarter of the
    finished trials and in all of them. Pruned trials are left out. Rough with few trials; empty with fewer than four
    or if all losses are equal.
    """
    from optuna import importance  # takes a second: it imports sklearn

    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.params]
    if len(finished) < MINIMUM_TRIALS or len({trial.value for trial in finished}) < 2:
        return {}
    evaluator = importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    return importance.get_param_importances(build_study(finished), evaluator=evaluator)


@dataclass(frozen=True)
class Recommendation:
    """The trial for best.yaml, and the reason as a sentence; empty in a sweep without default settings."""

    row: TrialRow
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Its trial, settings and reason."""
        row = self.row
        return {"trial": row.trial, "is_default": row.is_default, "params": row.params, "reason": self.reason}


def sum_blocks(row_nll: np.ndarray) -> list[float]:
    """Row losses summed over at most `MOST_BLOCKS` blocks; a row is in the same block in every trial."""
    blocks = np.zeros(min(len(row_nll), MOST_BLOCKS))
    np.add.at(blocks, np.arange(len(row_nll)) % MOST_BLOCKS, row_nll)
    return [float(f"{value:.9g}") for value in blocks]


def paired_interval(loss: float, blocks: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the difference between two losses on the same rows.

    Blocks of rows are treated as a sample: the standard error of the summed difference is sqrt(n) times the standard
    deviation of the block differences. None with fewer than two blocks, or if they do not match. `loss` is that of
    `blocks`, in nats per token.
    """
    if len(blocks) != len(others) or len(blocks) < 2 or not loss:
        return None
    tokens = sum(blocks) / loss
    differences = np.array(blocks) - np.array(others)
    error = NORMAL_95 * math.sqrt(len(differences)) * float(differences.std(ddof=1)) / tokens
    mean = float(differences.sum()) / tokens
    return mean - error, mean + error


def recommend_trial(board: Leaderboard, trials: Sequence[FrozenTrial]) -> Recommendation | None:
    """The best trial if it beats the default settings beyond noise, else the default; None if nothing finished.

    The noise is that of the validation rows (95 % interval of paired differences); seed noise is unknown.
    """
    best, default = board.best, next((row for row in board.rows if row.is_default), None)
    if best is None:
        return None
    if default is None:
        return Recommendation(best, "")
    if default.state != "finished":
        unknown = f"the default settings (trial {default.trial}) are {default.state}"
        return Recommendation(best, f"{unknown}: it is unknown whether these are better")
    if best is default:
        return Recommendation(default, "no trial is better than the default settings; best.yaml has those")
    assert best.validation_loss is not None and default.validation_loss is not None  # both are finished
    difference = best.validation_loss - default.validation_loss
    change = f"trial {best.trial} changes the default settings' loss by {difference:+.4f}"
    blocks = {first_number(trial): trial.user_attrs.get(BLOCKS, []) for trial in trials}
    interval = paired_interval(best.validation_loss, blocks[best.trial], blocks[default.trial])
    if interval is None:
        return Recommendation(best, f"{change}; how much of that is noise is unknown")
    known = f"95% interval {interval[0]:+.4f} to {interval[1]:+.4f} on these validation rows"
    if interval[1] >= 0:
        return Recommendation(default, f"{change}, which is within noise ({known}); best.yaml has the default settings")
    return Recommendation(best, f"{change} ({known})")
