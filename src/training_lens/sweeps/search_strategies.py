"""Which point a sweep tries next, and which trials it prunes.

Both depend only on the seed and the trials so far, so a killed sweep continues as before. No point is tried twice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from training_lens.config.schema import SweepSection
from training_lens.sweeps.space import Params, Space
from training_lens.sweeps.trials import current_trials, first_number

DRAWS = 100  # of a sampler that repeats tried points, before a free point is picked at random


def propose_point(space: Space, settings: SweepSection, history: Sequence[FrozenTrial]) -> Params | None:
    """A point that is not in `history`, or None if all were tried.

    `history` has the trials so far by number, failed and running ones included. Only it and the seed decide the draw.
    """
    tried = [trial.params for trial in history if trial.params]  # without default settings outside of the space
    if settings.sampler != "grid" and (space.size is None or len(tried) < space.size):
        study, distributions = build_study(history, _build_sampler(settings, len(history))), space.distributions()
        for _ in range(DRAWS):
            point = space.round_point(study.ask(distributions).params)
            if point not in tried:
                return point
    free = [point for point in space.list_points() if point not in tried] if space.size else []
    # In an order that does not change when other points are removed.
    return min(free, key=lambda point: random.Random(f"{settings.seed}/{sorted(point.items())}").random(), default=None)


def build_study(trials: Sequence[FrozenTrial], sampler: BaseSampler | None = None) -> optuna.Study:
    """The trials in order as an in-memory study."""
    study = optuna.create_study(sampler=sampler)
    study.add_trials(trials)
    return study


def _build_sampler(settings: SweepSection, number: int) -> BaseSampler:
    seed = random.Random(f"{settings.seed}/{number}").getrandbits(32)
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    startup = min(10, max(4, settings.trials // 3))  # random trials first; Optuna's 10 would be most of a short sweep
    return TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)  # running trials count as bad


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

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
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
