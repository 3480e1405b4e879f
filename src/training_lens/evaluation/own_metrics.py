"""Metrics of the user's own: one decorated function each.

Example:
    # my_metrics.py
    from training_lens.evaluation import metric

    @metric("ends_with_period")
    def ends_with_period(prediction, reference):
        return float(prediction.rstrip().endswith("."))

    training-lens compare evaluation.metrics=[my_metrics.ends_with_period]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from training_lens.errors import ConfigurationError, EvaluationError
from training_lens.utils.formatting import nearest, said, unstopped
from training_lens.utils.names import expand_home

KEY, GROUP = "evaluation.metrics", "training_lens.metrics"
# (prediction, reference) -> score, or None: the metric does not apply to this row.
ScoreFunction = Callable[[str, str], float | None]


@dataclass(frozen=True)
class AnswerMetric:
    """A user's metric: the score of a set is the mean over the rows that it applies to."""

    name: str
    function: ScoreFunction
    lower_is_better: bool = False

    def __call__(self, prediction: str, reference: str) -> float | None:
        """The row's score.

        Raises:
            EvaluationError: the function fails, or gives what is no finite number.
        """
        try:
            score = self.function(prediction, reference)
            value = None if score is None else float(score)
        except Exception as error:  # whatever a user's function raises
            raise EvaluationError(
                f"{KEY}: {self.name} fails on the answer {_short(prediction)} to {_short(reference)}: {said(error)}"
            ) from error
        if value is not None and not math.isfinite(value):
            raise EvaluationError(
                f"{KEY}: {self.name} gives {value} for the answer {_short(prediction)} to {_short(reference)}; give a "
                "finite number, or None where the metric does not apply."
            )
        return value


_METRICS: dict[str, AnswerMetric] = {}


def metric(name: str, *, lower_is_better: bool = False) -> Callable[[ScoreFunction], AnswerMetric]:
    """Decorator: make a function of (prediction, reference) a metric of this name.

    Args:
        name: in tables, in JSON, and for `evaluation.decide_by`.
        lower_is_better: for errors and distances.

    Raises:
        ConfigurationError: the name is no identifier, or another function has it.
    """
    if not name.isidentifier():
        raise ConfigurationError(f"{KEY}: '{name}' is no name of a metric; give letters, digits and _ alone.")

    def register(function: ScoreFunction) -> AnswerMetric:
        there = _METRICS.get(name)
        if there is not None and _place(there.function) != _place(function):
            raise ConfigurationError(
                f"{KEY}: '{name}' is {_place(there.function)} already; give {_place(function)} another name."
            )
        _METRICS[name] = AnswerMetric(name, function, lower_is_better)
        return _METRICS[name]

    return register


def find_metrics(places: Sequence[str], built_in: Sequence[str] = ()) -> dict[str, AnswerMetric]:
    """The metrics that `evaluation.metrics` names, by name.

    Code is imported only because the command line, the user's own config file or their program names it here, never
    because a run's folder does.

    Args:
        places: each a function (`my_metrics.polite`), all of a module (`my_metrics`) or of a file (`my_metrics.py`), or
            the name of one that is registered or that an installed package brings.
        built_in: names that are taken.

    Raises:
        ConfigurationError: there is no such metric, it cannot be imported, or its name is taken.
    """
    found = {own.name: own for place in places for own in _metrics_at(place)}
    if taken := sorted(set(found) & set(built_in)):
        raise ConfigurationError(f"{KEY}: the name {', '.join(taken)} is a built-in measure's; give yours another one.")
    return found


def _metrics_at(place: str) -> Iterator[AnswerMetric]:
    if place in _METRICS or place in (known := _packaged()):
        yield _METRICS.get(place) or _metric_from(known[place].load(), place)
    elif place.endswith(".py"):
        yield from _all_of(_module_of_file(place), place)
    elif "." in place and (member := _member(place)) is not None:
        yield _metric_from(member, place)
    else:
        yield from _all_of(_imported(place), place)


def _packaged() -> Mapping[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _member(place: str) -> Any | None:
    """The function of `module.function`; None where all of it is a module."""
    if util.find_spec(place.partition(".")[0]) is None and not Path(f"{place.partition('.')[0]}.py").exists():
        return None
    module, name = place.rsplit(".", 1)
    found = _imported(module)
    if hasattr(found, name):
        return getattr(found, name)
    hint = nearest(name, [own.function.__name__ for own in _all_in(found)])
    raise ConfigurationError(
        f"{KEY}: the module '{module}' has no '{name}'.{f' Did you mean {module}.{hint}?' if hint else ''}"
    )


def _imported(module: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(module)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise ConfigurationError(
            f"{KEY}: '{module}' cannot be imported ({unstopped(said(error))}). Give module.function of a module in "
            "this folder or of an installed package, or a file such as my_metrics.py."
        ) from error


def _module_of_file(place: str) -> Any:
    path = expand_home(place).resolve()
    if not path.is_file():
        raise ConfigurationError(f"{KEY}: there is no file '{place}'.")
    spec = util.spec_from_file_location(f"training_lens_metrics_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{KEY}: '{place}' cannot be imported ({unstopped(said(error))}).") from error
    return module


def _all_in(module: Any) -> list[AnswerMetric]:
    return [value for value in vars(module).values() if isinstance(value, AnswerMetric)]


def _all_of(module: Any, place: str) -> list[AnswerMetric]:
    if found := _all_in(module):
        return found
    raise ConfigurationError(
        f"{KEY}: '{place}' has no metric; put @metric(\"name\") (from training_lens.evaluation) above the function."
    )


def _metric_from(value: Any, place: str) -> AnswerMetric:
    if isinstance(value, AnswerMetric):
        return value
    raise ConfigurationError(
        f"{KEY}: '{place}' is no metric; put @metric(\"name\") (from training_lens.evaluation) above the function."
    )


def _place(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:59]}…")
