"""The next point to try: a function of the seed and the trials so far, so that a killed sweep continues as before.

No point is proposed twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from training_lens.config.schema import SweepSection
from training_lens.sweeps.space import Params, Space

DRAWS = 100  # of a sampler that repeats tried points, before a free point is picked at random


def propose_point(space: Space, settings: SweepSection, history: Sequence[FrozenTrial]) -> Params | None:
    """A point that is not in `history`, or None if all were tried.

    Args:
        history: the trials so far by number, including failed and running ones. Only it and the seed decide the draw.
    """
    tried = _tried_points(history)
    if settings.sampler != "grid":
        drawn = _draw_point(space, settings, history)
        if drawn is not None:
            return drawn
    free = [point for point in space.list_points() if point not in tried] if space.size else []
    return _shuffle_points(free, settings.seed)[0] if free else None


def _draw_point(space: Space, settings: SweepSection, history: Sequence[FrozenTrial]) -> Params | None:
    """A new point from the sampler; None if it finds none."""
    tried = _tried_points(history)
    if space.size is not None and len(tried) >= space.size:
        return None
    study = build_study(history, _build_sampler(settings, len(history)))
    distributions = space.distributions()
    points = (space.round_point(study.ask(distributions).params) for _ in range(DRAWS))
    return next((point for point in points if point not in tried), None)


def _tried_points(history: Sequence[FrozenTrial]) -> list[Params]:
    """The points of the trials, without default settings outside of the space."""
    return [trial.params for trial in history if trial.params]


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


def _shuffle_points(points: list[Params], seed: int) -> list[Params]:
    """The points in a random order that does not change when other points are removed."""
    return sorted(points, key=lambda point: random.Random(f"{seed}/{sorted(point.items())}").random())
