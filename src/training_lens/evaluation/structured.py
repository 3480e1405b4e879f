"""Scores of answers that are JSON."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NoReturn

from training_lens.utils.limits import load_bounded_json


def json_valid(prediction: str, reference: str) -> float | None:
    """1 where the prediction is JSON (RFC 8259), 0 where it is none.

    All of it must be, but for white space at both ends: JSON between words or in a Markdown fence is none, and neither
    are NaN and Infinity.

    Returns:
        None where the reference is no JSON object or array: no JSON was asked for.

    Example:
        >>> json_valid('{"a": 2}', '{"a": 1}'), json_valid('{"a": 1', '{"a": 1}'), json_valid("{}", "Tom")
        (1.0, 0.0, None)
    """
    if not isinstance(_parse_json(reference), dict | list):
        return None
    return float(_parse_json(prediction) is not _NO_JSON)


def json_fields(prediction: str, reference: str) -> float | None:
    """The share of the reference's values that the prediction has in the same place; 0 where it is no JSON.

    A place is a path of keys and positions; an empty object or array is a value, too. Values are equal in type and
    content, numbers as numbers: 1 is 1.0, but neither "1" nor true. What the prediction has beyond them is not counted.

    Returns:
        None where the reference is no JSON object or array.

    Example:
        >>> json_fields('{"name": "Tom", "tags": ["x"]}', '{"name": "Tom", "tags": ["x", "y"]}')
        0.6666666666666666
    """
    expected = _parse_json(reference)
    if not isinstance(expected, dict | list):
        return None
    wanted, found = _list_leaves(expected), _list_leaves(_parse_json(prediction))
    return sum(_is_equal(found.get(place, _NO_JSON), value) for place, value in wanted.items()) / len(wanted)


_NO_JSON = object()


def _parse_json(text: str) -> Any:
    """The value, numbers as Decimal; _NO_JSON where there is none, or one nested beyond what Python can read."""
    try:
        return load_bounded_json(text.strip(), parse_int=Decimal, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, ArithmeticError):  # ArithmeticError: an exponent beyond Decimal's
        return _NO_JSON


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _list_leaves(value: Any) -> dict[tuple[str | int, ...], Any]:
    """What is at the end of each path; no recursion, so that all that could be parsed can be walked."""
    leaves: dict[tuple[str | int, ...], Any] = {}
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, here = waiting.pop()
        if here and isinstance(here, dict | list):
            inside = here.items() if isinstance(here, dict) else enumerate(here)
            waiting += [((*path, step), below) for step, below in inside]
        else:
            leaves[path] = here
    return leaves


def _is_equal(found: Any, wanted: Any) -> bool:
    return type(found) is type(wanted) and bool(found == wanted)
