"""Scores of answers that are JSON."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NoReturn

from training_lens.utils.limits import load_bounded_json


def json_valid(prediction: str, reference: str) -> float | None:
    """1 where the whole prediction is valid JSON (RFC 8259), else 0.

    White space at both ends is allowed. JSON between words or in a Markdown fence is invalid, and so are NaN and
    Infinity.

    Returns:
        None where the reference is no JSON object or array.

    Example:
        >>> json_valid('{"a": 2}', '{"a": 1}'), json_valid('{"a": 1', '{"a": 1}'), json_valid("{}", "Tom")
        (1.0, 0.0, None)
    """
    if not isinstance(_parse_json(reference), dict | list):
        return None
    return float(_parse_json(prediction) is not _NO_JSON)


def json_fields(prediction: str, reference: str) -> float | None:
    """The share of the reference's values that the prediction has at the same path; 0 where it is no JSON.

    A path is keys and indices; an empty object or array is a value, too. Values must be equal in type and content;
    the number 1 equals 1.0, but not "1" or true. Further values of the prediction are ignored.

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
    """The value, with numbers as Decimal; _NO_JSON where the text is invalid or nested too deep."""
    try:
        return load_bounded_json(text.strip(), parse_int=Decimal, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, ArithmeticError):  # ArithmeticError: an exponent beyond Decimal's
        return _NO_JSON


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _list_leaves(value: Any) -> dict[tuple[str | int, ...], Any]:
    """The leaf values by path; without recursion, so that any depth works."""
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
