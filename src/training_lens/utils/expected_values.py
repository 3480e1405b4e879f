"""What pydantic expected of a value, in the words of our messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of keys to values",
}
CAUSES = ("_type", "_parsing", "_from_float", "_parsing_size")  # of an error of one of these kinds
LIMITS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "none_required": "null",
    "too_short": "a list of {min_length} or more values",
    "too_long": "a list of at most {max_length} values",
    "string_too_short": "a text of {min_length} or more characters",
    "string_too_long": "a text of at most {max_length} characters",
}
EXPECTED = {f"{kind}{cause}": words for kind, words in KINDS.items() for cause in CAUSES} | LIMITS


def describe_expected(problem: Mapping[str, Any]) -> str:
    """'a whole number', 'at least 1': what an error of pydantic's `errors()` expected; empty for other kinds of errors.

    Example:
        >>> describe_expected({"type": "greater_than_equal", "ctx": {"ge": 1.0}})
        'at least 1'
    """
    limits = {name: _shorten(limit) for name, limit in problem.get("ctx", {}).items()}
    return EXPECTED.get(problem["type"], "").format(**limits)


def _shorten(limit: Any) -> Any:
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit
