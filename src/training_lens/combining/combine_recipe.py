"""How adapters are combined: the method and its settings, checked without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training_lens.errors import ConfigurationError

Method = Literal["cat", "linear", "svd", "ties", "dare"]
SPARSE = ("ties", "dare")
TAKES = {"density": SPARSE, "rank": ("svd", *SPARSE), "seed": ("dare",)}  # the methods that use a setting
DENSITY, SEED = 0.5, 0


@dataclass(frozen=True)
class Recipe:
    """The method, a weight for each adapter, and what only some methods take: None where this one does not.

    `density` is the share of each update's numbers that is kept, `rank` that of the written adapter (None: the largest
    rank among the adapters of a module), `seed` draws what is kept.
    """

    how: Method
    weights: tuple[float, ...]
    density: float | None = None
    rank: int | None = None
    seed: int | None = None


def build_recipe(
    how: Method,
    adapters: int,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe for so many adapters, with defaults: density 0.5, seed 0, and weights that make a mean.

    These are 1 / adapters, and 1 for ties, which takes a mean itself.

    Raises:
        ConfigurationError: lists every setting that is wrong, or that this method would ignore.
    """
    chosen = tuple(weights) if weights is not None else (1.0 if how == "ties" else 1 / adapters,) * adapters
    given = {"density": density, "rank": rank, "seed": seed}
    problems = [
        f"--{name}: --how {how} does not use it, only {', '.join(methods)}. Leave it out."
        for name, methods in TAKES.items()
        if given[name] is not None and how not in methods
    ]
    if len(chosen) != adapters:
        problems.append(f"--weights: {len(chosen)} for {adapters} adapters; give one for each, in their order.")
    if wrong := [weight for weight in chosen if not weight or not math.isfinite(weight)]:
        problems.append(f"--weights: {wrong[0]:g} is no weight; give a number other than 0, or leave that run out.")
    if density is not None and not 0 < density <= 1:
        problems.append(f"--density {density:g}: give a share above 0 and at most 1, such as 0.5.")
    if rank is not None and rank < 1:
        problems.append(f"--rank {rank}: give a whole number above 0.")
    if seed is not None and seed < 0:
        problems.append(f"--seed {seed}: give 0 or a larger whole number.")
    if problems:
        raise ConfigurationError(problems)
    used_density = (DENSITY if density is None else density) if how in SPARSE else None
    return Recipe(how, chosen, used_density, rank, (seed or SEED) if how == "dare" else None)
