"""The user's own metrics: one decorated function each.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from importlib.metadata import entry_points
from inspect import ismodule, signature
from pathlib import Path
from typing import Any, overload

from training_lens.errors import ConfigurationError, EvaluationError
from training_lens.utils.formatting import cut_text, describe_error, nearest_name, strip_full_stop
from training_lens.utils.names import expand_home

KEY, GROUP = "evaluation.metrics", "training_lens.metrics"
# (prediction, reference) -> score, or None: the metric does not apply to this row.
ScoreFunction = Callable[[str, str], float | None]


@dataclass(frozen=True)
class AnswerMetric:
    """A user's metric; the score of a set is the mean over the rows that it applies to."""

    name: str
    function: ScoreFunction
    lower_is_better: bool = False

    def __call__(self, prediction: str, reference: str) -> float | None:
        """The row's score.

        Raises:
            EvaluationError: the function fails, or its result is not finite.
        """
        try:
            score = self.function(prediction, reference)
            value = None if score is None else float(score)
        except Exception as error:  # whatever a user's function raises
            raise EvaluationError(
                f"{KEY}: {self.name} fails on {_quote_pair(prediction, reference)}: {describe_error(error)}"
            ) from error
        if value is not None and not math.isfinite(value):
            raise EvaluationError(
                f"{KEY}: {self.name} gives {value} for {_quote_pair(prediction, reference)}; give a finite number, or "
                "None where the metric does not apply."
            )
        return value


_METRICS: dict[str, AnswerMetric] = {}


@overload
def metric(name: ScoreFunction) -> AnswerMetric: ...
@overload
def metric(name: str | None = None, *, lower_is_better: bool = False) -> Callable[[ScoreFunction], AnswerMetric]: ...
def metric(
    name: str | ScoreFunction | None = None, *, lower_is_better: bool = False
) -> AnswerMetric | Callable[[ScoreFunction], AnswerMetric]:
    """Decorator: make a function of (prediction, reference) a metric; with or without parentheses.

    Args:
        name: in tables, in JSON, and for `evaluation.decide_by`; the function's own name where it is left out.
        lower_is_better: for errors and distances.

    Raises:
        ConfigurationError: the name is no identifier, or is taken by another function; or the function does not take
            two arguments.
    """
    if name is not None and not isinstance(name, str):
        return _register_metric(name, name.__name__, lower_is_better)
    if name is not None:
        _require_identifier(name)
    return lambda function: _register_metric(function, name or function.__name__, lower_is_better)


def _require_identifier(name: str) -> None:
    if not name.isidentifier():
        raise ConfigurationError(f"{KEY}: '{name}' is no name of a metric; give letters, digits and _ alone.")


def _register_metric(function: ScoreFunction, name: str, lower_is_better: bool) -> AnswerMetric:
    _require_identifier(name)  # that of a lambda is none
    place, known = _function_place(function), _METRICS.get(name)
    if known is not None and (taken := _function_place(known.function)) != place:
        raise ConfigurationError(f"{KEY}: '{name}' is {taken} already; give {place} another name.")
    try:
        signature(function).bind("prediction", "reference")
    except TypeError as error:
        raise ConfigurationError(
            f"{KEY}: {name} does not take (prediction, reference): {strip_full_stop(describe_error(error))}."
        ) from error
    except ValueError:  # a function in C does not say what it takes
        pass
    _METRICS[name] = AnswerMetric(name, function, lower_is_better)
    return _METRICS[name]


def find_metrics(places: Sequence[str], built_in: Sequence[str] = ()) -> dict[str, AnswerMetric]:
    """The metrics that `evaluation.metrics` names, by name.

    Code is imported only if the command line, the user's own config file or their program names it, never because a
    run's folder does.

    Args:
        places: each a function (`my_metrics.polite`), all of a module (`my_metrics`) or of a file (`my_metrics.py`), or
            the name of a metric that is registered or comes with an installed package.
        built_in: names that are taken.

    Raises:
        ConfigurationError: a metric does not exist or cannot be imported, or its name is taken.
    """
    found = {own.name: own for place in places for own in _find_metrics_at(place)}
    if taken := sorted(set(found) & set(built_in)):
        raise ConfigurationError(f"{KEY}: the name {', '.join(taken)} is a built-in measure's; give yours another one.")
    return found


def _find_metrics_at(place: str) -> Iterator[AnswerMetric]:
    if place in _METRICS:
        yield _METRICS[place]
    elif packaged := entry_points(group=GROUP, name=place):
        yield from _require_metrics(next(iter(packaged)).load(), place)
    elif place.endswith(".py"):
        yield from _require_metrics(_load_file(place), place)
    elif "." in place and (member := _find_member(place)) is not None:
        yield from _require_metrics(member, place)
    else:
        yield from _require_metrics(_import_module(place), place)


def _find_member(place: str) -> Any | None:
    """The function of `module.function`; None where the whole name is a module."""
    if util.find_spec(place.partition(".")[0]) is None and not Path(f"{place.partition('.')[0]}.py").exists():
        return None
    module, name = place.rsplit(".", 1)
    found = _import_module(module)
    if hasattr(found, name):
        return getattr(found, name)
    hint = nearest_name(name, [own.function.__name__ for own in _list_metrics(found)])
    raise ConfigurationError(
        f"{KEY}: the module '{module}' has no '{name}'.{f' Did you mean {module}.{hint}?' if hint else ''}"
    )


def _import_module(module: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(module)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise ConfigurationError(
            f"{KEY}: '{module}' cannot be imported ({strip_full_stop(describe_error(error))}). Give module.function of "
            "a module in this folder or of an installed package, or a file such as my_metrics.py."
        ) from error


def _load_file(place: str) -> Any:
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
        raise ConfigurationError(
            f"{KEY}: '{place}' cannot be imported ({strip_full_stop(describe_error(error))})."
        ) from error
    return module


def _list_metrics(module: Any) -> list[AnswerMetric]:
    return [value for value in vars(module).values() if isinstance(value, AnswerMetric)]


def _require_metrics(value: Any, place: str) -> list[AnswerMetric]:
    """The metric itself, or those of a module."""
    found = [value] if isinstance(value, AnswerMetric) else _list_metrics(value) if ismodule(value) else []
    if not found:
        raise ConfigurationError(
            f"{KEY}: '{place}' {'has' if ismodule(value) else 'is'} no metric; put @metric (from "
            "training_lens.evaluation) above the function."
        )
    return found


def _function_place(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"


def _quote_pair(prediction: str, reference: str) -> str:
    """Prediction and reference for an error message, each cut to 60 characters."""
    shown, expected = (repr(cut_text(text, 60)) for text in (prediction, reference))
    return f"the answer {shown} to {expected}"
