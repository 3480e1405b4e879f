"""Which trials are pruned: a function of the losses that each trial has reported so far, by validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna import Study
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.trial import FrozenTrial

from training_lens.config.schema import SweepSection
from training_lens.sweeps.trials import current_trials, first_number


def build_pruner(settings: SweepSection) -> BasePruner:
    """The pruner that `sweep.pruner` names."""
    if settings.pruner == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=0)
    return SuccessiveHalving() if settings.pruner == "successive_halving" else NopPruner()


class SuccessiveHalving(BasePruner):
    """At validations 1, 2, 4, 8, ... the better half continues.

    Asynchronous successive halving (arXiv 1810.05934). Optuna's own pruner stores the progress in each trial. A resumed
    run is a new trial to Optuna, so there it would start over and compete with itself.
    """

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial is in the worse half at its last reported validation."""
        validation = trial.last_step
        if validation is None or validation & (validation - 1):  # not a power of two
            return False
        others = [t for t in current_trials(study.get_trials(deepcopy=False)) if first_number(t) != first_number(trial)]
        rivals = [t.intermediate_values[validation] for t in others if validation in t.intermediate_values]
        return is_in_worse_half(trial.intermediate_values[validation], rivals)


def is_in_worse_half(loss: float, rivals: Sequence[float]) -> bool:
    """Whether `loss` is not in the lower half (rounded down, at least one) of itself and `rivals`.

    Example:
        >>> in_worse_half(2.0, []), in_worse_half(2.0, [1.0]), in_worse_half(2.0, [1.0, 3.0, 4.0])
        (False, True, False)
    """
    losses = sorted(x for x in (loss, *rivals) if not math.isnan(x))
    return math.isnan(loss) or loss > losses[max(len(losses) // 2, 1) - 1]
