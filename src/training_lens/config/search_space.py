"""The search space of a sweep: which keys are tried, and with what. Checked against the schema before any trial."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from training_lens.config.keys import known_keys, nearest_key
from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.limits import CHOICES

# All else either does not change training, or changes which tokens are evaluated: losses could not be compared.
SEARCHED = (
    *("peft.", "training.", "data.max_examples", "data.weights"),
    *("model.dtype", "model.quantization", "model.attention"),
)
RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True)
class ChoiceDimension:
    """A list of values of a key, as the schema reads them."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class RangeDimension:
    """The numbers from `low` to `high`, inclusive; with `step` (1 for whole numbers) a grid.

    `log` samples uniformly in the logarithm.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def value_count(self) -> int | None:
        """The number of values; None for a continuous range."""
        step = self.step or (1 if self.whole else None)
        return None if step is None else round((self.high - self.low) / step) + 1

    def round_number(self, number: float) -> float:
        """`number` as a trial uses it: a whole number, or 10 significant digits within the range."""
        return round(number) if self.whole else min(max(float(f"{number:.10g}"), self.low), self.high)


Dimension = ChoiceDimension | RangeDimension


def flatten_keys(space: Mapping[str, Any]) -> dict[str, Any]:
    """A search space with dotted keys.

    Example:
        >>> flatten_keys({"peft": {"r": [4, 8]}, "training.lr": {"low": 1e-4, "high": 1e-2}})
        {'peft.r': [4, 8], 'training.lr': {'low': 0.0001, 'high': 0.01}}
    """
    full: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, Mapping) and value and not set(value) & set(RANGE):
            full |= {f"{key}.{inner}": spec for inner, spec in flatten_keys(value).items()}
        else:
            full[key] = value
    return full


def parse_space(config: TrainingConfig) -> dict[str, Dimension]:
    """The dimensions of `config.sweep.space`, by key.

    Raises:
        ConfigurationError: lists every unknown or unsearchable key, and every invalid value.
    """
    dimensions: dict[str, Dimension] = {}
    problems: list[str] = []
    for key, given in flatten_keys(config.sweep.space).items():
        try:
            _require_searched(config, key)
            dimensions[key] = _parse_dimension(config, key, given)
        except ConfigurationError as error:
            problems += [f"sweep.space.{key}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigurationError(problems)
    return dimensions


def _require_searched(config: TrainingConfig, key: str) -> None:
    known = known_keys(TrainingConfig)
    if key not in known:
        close = nearest_key(key, [k for k in known if k.startswith(SEARCHED)])
        raise ConfigurationError(f"unknown key; did you mean '{close}'?" if close else "unknown key")
    if not key.startswith(SEARCHED):
        searched = ", ".join(f"{name}*" if name.endswith(".") else name for name in SEARCHED)
        raise ConfigurationError(
            "no trial can differ in it: it changes nothing in training, or which tokens are validated, and losses on "
            f"other tokens cannot be compared. A sweep takes {searched}"
        )
    if key == "training.seed" and config.data.val_ratio:
        raise ConfigurationError("the seed also draws the validation rows of data.val_ratio; give data.validation")


def _parse_dimension(config: TrainingConfig, key: str, given: Any) -> Dimension:
    if isinstance(given, list) and given:
        return _parse_choices(config, key, given)
    if isinstance(given, Mapping) and given:
        return _parse_range(config, key, given)
    raise ConfigurationError(f"given {given!r}; give choices such as [4, 8], or a range such as {{low: 4, high: 64}}")


def _parse_choices(config: TrainingConfig, key: str, given: list[Any]) -> ChoiceDimension:
    if len(given) > CHOICES:
        raise ConfigurationError(f"{len(given):,} values, at most {CHOICES:,} can be tried; give a range")
    values: list[Any] = []
    problems: list[str] = []
    for item in given:
        try:
            values.append(_validate_value(config, key, item))
        except ConfigurationError as error:
            problems += error.problems
    problems += [f"{value!r} is given twice" for i, value in enumerate(values) if value in values[:i]]
    if problems:
        raise ConfigurationError(problems)
    return ChoiceDimension(tuple(values))


def _validate_value(config: TrainingConfig, key: str, value: Any) -> Any:
    """`value` as the section of the key validates it."""
    section_name, name = key.split(".")
    section = getattr(config, section_name).model_copy()
    try:
        setattr(section, name, value)
    except ConfigurationError as error:
        raise ConfigurationError([problem.removeprefix(f"{name}: ") for problem in error.problems]) from None
    return getattr(section, name)


def _parse_range(config: TrainingConfig, key: str, given: Mapping[str, Any]) -> RangeDimension:
    whole = _is_whole(config, key)
    _require_numbers(given, whole)
    for end in ("low", "high"):
        _validate_value(config, key, given[end])
    found = RangeDimension(given["low"], given["high"], given.get("log", False), given.get("step"), whole)
    problem = _describe_problem(found)
    if problem:
        raise ConfigurationError(problem)
    return found


def _is_whole(config: TrainingConfig, key: str) -> bool:
    """Whether the key takes whole numbers only; one that takes no numbers at all is an error."""
    section_name, name = key.split(".")
    annotation = type(getattr(config, section_name)).model_fields[name].annotation
    members = get_args(annotation)
    annotated = (kind for member in members for kind in get_args(member)[:1])  # int in Annotated[int, ...]
    kinds = {annotation, *members, *annotated}
    if not kinds & {int, float}:
        raise ConfigurationError("takes no numbers, so it has no range; give choices, a list")
    return float not in kinds


def _require_numbers(given: Mapping[str, Any], whole: bool) -> None:
    problems = []
    for name in given:
        if name not in RANGE:
            hint = did_you_mean(str(name), RANGE)
            problems.append(f"'{name}' is no part of a range, it has {', '.join(RANGE)}.{hint}")
    problems += [f"a range needs {end}" for end in ("low", "high") if end not in given]
    for name in ("low", "high", "step"):
        if given.get(name) is not None and not _is_number(given[name], whole):
            problems.append(f"{name}: given {given[name]!r}, expected a {'whole ' if whole else ''}number")
    if not isinstance(given.get("log", False), bool):
        problems.append(f"log: given {given['log']!r}, expected true or false")
    if problems:
        raise ConfigurationError(problems)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return abs(value) <= sys.float_info.max  # false of NaN; of whole numbers, 10**400 is no float


def _describe_problem(found: RangeDimension) -> str | None:
    """The problem with the numbers of a range, if any."""
    if found.low >= found.high:
        return f"low {found.low:g} is not below high {found.high:g}"
    if found.log and found.low <= 0:
        return f"low {found.low:g}: a range with log begins above 0"
    if found.step is None:
        return None
    if found.log:
        return "log and step are both given; keep one, or list the values"
    if found.step <= 0:
        return f"step {found.step:g} is not above 0"
    steps = (found.high - found.low) / found.step
    if abs(steps - round(steps)) > 1e-6:
        return f"steps of {found.step:g} from low {found.low:g} miss high {found.high:g}; give a high that they reach"
    return None
