"""Converts the search space of the config to Optuna distributions, and points to trial configs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from training_lens.config.schema import TrainingConfig
from training_lens.config.search_space import ChoiceDimension, Dimension, RangeDimension, parse_space
from training_lens.errors import ConfigurationError
from training_lens.utils.nested import nest_keys

Params = dict[str, Any]
ENUMERATED = 10_000  # points of a space that can be listed; a larger space counts as infinite
FIRST_VALUES, FIRST_POINTS = 8, 500  # per key and in total: searched for a first valid point


@dataclass(frozen=True)
class Space:
    """What a sweep tries, by key. A point is `Params`: plain values that Optuna stores (lists as JSON text)."""

    dimensions: Mapping[str, Dimension]

    @classmethod
    def from_config(cls, config: TrainingConfig) -> Space:
        """The space of `config.sweep`.

        Raises:
            ConfigurationError: there is nothing to search, a key or value cannot be searched, or a grid is infinite.
        """
        space = cls(parse_space(config))
        if not space.dimensions:
            raise ConfigurationError(
                "sweep.space: nothing to search. Give a preset (sweep=lr, sweep=rank, sweep=full), or keys with "
                "values, such as sweep.space.peft.r=[4,8,16]."
            )
        problems = [
            f"sweep.space.{key}: a grid of a continuous range has no end; give it a step, or choices, or another "
            "sweep.sampler"
            for key, found in space.dimensions.items()
            if _count_values(found) is None
        ]
        if space.size is None and not problems:
            problems = [f"sweep.sampler: this grid has over {ENUMERATED:,} points; search less, or with tpe or random"]
        if config.sweep.sampler == "grid" and problems:
            raise ConfigurationError(problems)
        return space

    @property
    def size(self) -> int | None:
        """The number of points; None if infinite or over `ENUMERATED`."""
        sizes = [_count_values(found) or math.inf for found in self.dimensions.values()]
        points = math.prod(sizes)
        return int(points) if points <= ENUMERATED else None

    def list_points(self) -> Iterator[Params]:
        """Every point of a space with a `size`; the last key changes fastest."""
        for values in product(*(_list_values(found) for found in self.dimensions.values())):
            yield dict(zip(self.dimensions, values, strict=True))

    def first_valid_point(self, base: TrainingConfig) -> Params:
        """The first point with a valid config, from the first choices and lowest numbers of each key.

        Raises:
            ConfigurationError: none is valid; lists the problems of the first one.
        """
        some = [list(islice(_list_values(found), FIRST_VALUES)) for found in self.dimensions.values()]
        problems: tuple[str, ...] = ()
        for values in islice(product(*some), FIRST_POINTS):
            point = dict(zip(self.dimensions, values, strict=True))
            try:
                self.trial_config(base, point)
            except ConfigurationError as error:
                problems = problems or error.problems
            else:
                return point
        first = ", ".join(f"{key}={values[0]}" for key, values in zip(self.dimensions, some, strict=True))
        raise ConfigurationError([f"sweep.space: with {first}: {problem}" for problem in problems])

    def distributions(self) -> dict[str, BaseDistribution]:
        """The distributions for Optuna's samplers."""
        return {key: _build_distribution(found) for key, found in self.dimensions.items()}

    def round_point(self, drawn: Mapping[str, Any]) -> Params:
        """A sampler's draw, rounded to the values that are tried and stored."""
        ranges = {key: found for key, found in self.dimensions.items() if isinstance(found, RangeDimension)}
        return {key: ranges[key].round_number(value) if key in ranges else value for key, value in drawn.items()}

    def find_point(self, values: Mapping[str, Any]) -> Params | None:
        """Config values by dotted key as a point; None if one of them is not in the space."""
        if all(_has_value(found, values[key]) for key, found in self.dimensions.items()):
            return {key: _encode_choice(values[key]) for key in self.dimensions}
        return None

    def config_values(self, params: Params) -> dict[str, Any]:
        """The point as config values by dotted key."""
        return {key: _decode_choice(self.dimensions[key], value) for key, value in params.items()}

    def trial_config(
        self, base: TrainingConfig, params: Params, output: Mapping[str, Any] | None = None
    ) -> TrainingConfig:
        """The base config with the point's values and the given keys of the output section.

        Raises:
            ConfigurationError: the values do not fit together.
        """
        return base.replace_keys(**nest_keys({"output": output or {}, **self.config_values(params)})[0])


def _count_values(found: Dimension) -> int | None:
    return len(found.values) if isinstance(found, ChoiceDimension) else found.value_count


def _list_values(found: Dimension) -> Iterator[Any]:
    """All values in order; only the lowest of a continuous range."""
    if isinstance(found, ChoiceDimension):
        yield from map(_encode_choice, found.values)
    else:
        step = found.step or 1
        yield from (found.round_number(found.low + i * step) for i in range(found.value_count or 1))


def _has_value(found: Dimension, value: Any) -> bool:
    if isinstance(found, ChoiceDimension):
        return value in found.values
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and found.low <= value <= found.high and found.round_number(value) == value


def _encode_choice(value: Any) -> Any:
    """A choice in the form that Optuna stores: lists and mappings as JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _decode_choice(found: Dimension, stored: Any) -> Any:
    if isinstance(found, RangeDimension):
        return stored
    return next(value for value in found.values if _encode_choice(value) == stored)


def _build_distribution(found: Dimension) -> BaseDistribution:
    if isinstance(found, ChoiceDimension):
        return CategoricalDistribution([_encode_choice(value) for value in found.values])
    if found.whole:
        return IntDistribution(round(found.low), round(found.high), log=found.log, step=round(found.step or 1))
    return FloatDistribution(found.low, found.high, log=found.log, step=found.step)
