"""The settings that a sweep recommends: the default settings unless others are clearly better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from training_lens.sweeps.leaderboard import Leaderboard, TrialRow
from training_lens.sweeps.trials import BLOCKS, first_number

MOST_BLOCKS = 256  # of validation rows: the number of loss sums stored with a trial
NORMAL_95 = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Recommendation:
    """The trial for best.yaml, and the reason as a sentence; empty in a sweep without default settings."""

    row: TrialRow
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Its trial, settings and reason."""
        return {"trial": self.row.trial, "is_default": self.row.is_default, "params": self.row.params} | {
            "reason": self.reason
        }


def sum_blocks(row_nll: np.ndarray) -> list[float]:
    """Row losses summed over at most `MOST_BLOCKS` blocks; a row is in the same block in every trial."""
    blocks = np.zeros(min(len(row_nll), MOST_BLOCKS))
    np.add.at(blocks, np.arange(len(row_nll)) % MOST_BLOCKS, row_nll)
    return [float(f"{value:.9g}") for value in blocks]


def paired_interval(loss: float, blocks: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the difference between two losses on the same rows.

    Blocks of rows are treated as a sample: the standard error of the summed difference is sqrt(n) times the standard
    deviation of the block differences. None with fewer than two blocks, or if they do not match.

    Args:
        loss: in nats per token, of `blocks`.
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
    blocks = {first_number(trial): trial.user_attrs.get(BLOCKS, []) for trial in trials}
    return _compare_with_default(best, default, blocks[best.trial], blocks[default.trial])


def _compare_with_default(
    best: TrialRow, default: TrialRow, blocks: Sequence[float], of_default: Sequence[float]
) -> Recommendation:
    assert best.validation_loss is not None and default.validation_loss is not None  # both are finished
    difference = best.validation_loss - default.validation_loss
    change = f"trial {best.trial} changes the default settings' loss by {difference:+.4f}"
    interval = paired_interval(best.validation_loss, blocks, of_default)
    if interval is None:
        return Recommendation(best, f"{change}; how much of that is noise is unknown")
    known = f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f} on these validation rows"
    if interval[1] >= 0:
        return Recommendation(default, f"{change}, which is within noise ({known}); best.yaml has the default settings")
    return Recommendation(best, f"{change} ({known})")
