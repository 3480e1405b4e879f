"""Convert values of rows to text, or raise an error that says why that is impossible.

Answers may be any JSON value or a date; `write_value` writes them uniformly.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from training_lens.data.examples import Row
from training_lens.errors import DatasetError
from training_lens.utils.formatting import list_names
from training_lens.utils.limits import load_bounded_json

NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdd3]")


def parse_json(place: str, text: Any, expected: str) -> Any:
    """Parse JSON text; `expected` describes it in error messages."""
    try:
        return load_bounded_json(text)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{place}: expected {expected}, found {str(text)[:60]!r} ({error}).") from error


def look_up_value(values: Mapping[str, Any], key: str) -> Any:
    """The value under a key, or None; a dotted key leads into objects and the first items of lists.

    Example:
        >>> look_up_value({"answers": {"text": ["in the wood", "there"]}}, "answers.text")
        'in the wood'
    """
    if key in values or "." not in key:
        return values.get(key)
    value: Any = values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, list):
            value = value[0] if value else None
    return value


def read_text(row: Row, key: str) -> str:
    """The text (or number, as text) under a key.

    Raises:
        DatasetError: missing, null, NaN, empty or not text; names row and key.
    """
    value = look_up_value(row.values, key)
    number = (isinstance(value, int) and not isinstance(value, bool)) or _is_finite(value)
    if not (number or (isinstance(value, str) and value.strip())):
        raise no_text_error(row, key, value)
    return require_encodable(f"{row.place}: '{key}'", str(value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def no_text_error(row: Row, key: str, value: Any) -> DatasetError:
    """The error that the value under a key is not text, or that the key is missing."""
    if key.split(".")[0] not in row.values:
        there = list_names(row.values) or "none"
        return DatasetError(f"{row.place}: has no field '{key}' (its fields: {there}). Add it, or remove the row.")
    return DatasetError(f"{row.place}: '{key}' is {describe_value(value)}, expected text. Fix it, or remove the row.")


def write_value(value: Any) -> str | None:
    """A JSON value or a date as answer text; None if it cannot be written.

    Objects and lists become compact JSON without ASCII escapes, booleans `true` or `false`, numbers as in JSON (3.0
    stays `3.0`), dates and times ISO 8601.

    Example:
        >>> write_value({"age": 3, "seen": [True, None]}), write_value(3.0), write_value(datetime.date(2024, 2, 1))
        ('{"age":3,"seen":[true,null]}', '3.0', '2024-02-01')
    """
    if value is None:
        return None
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return _write_plain(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_write_plain)
    except (TypeError, ValueError):
        return None


def describe_plural(value: Any) -> str:
    """The plural for values like this one: 'objects', 'numbers'."""
    kinds: tuple[tuple[Any, str], ...] = (
        (Mapping, "objects"),
        (list, "lists"),
        (bool, "true or false"),
        (datetime.date | datetime.time, "dates or times"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "numbers")


def _write_plain(value: Any) -> str:
    """Dates, times and decimals, which JSON lacks, as text."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written")


def require_encodable(place: str, text: str) -> str:
    """`text`, unless it has lone surrogates or noncharacters that serve as placeholders in templates."""
    if found := None if text.isascii() else NO_TEXT.search(text):
        what = "half a surrogate pair" if "\ud800" <= found[0] <= "\udfff" else "a noncharacter of Unicode"
        raise DatasetError(f"{place} holds {what} (U+{ord(found[0]):04X}) at {found.start()}. Take it out.")
    return text


def read_optional_text(row: Row, key: str | None) -> str:
    """Like `read_text`, but empty if the field is missing or empty."""
    return "" if key is None or look_up_value(row.values, key) in (None, "") else read_text(row, key)


def describe_value(value: Any) -> str:
    """Describe a value in error messages: 'null', 'empty', 'a list'."""
    if value is None:
        return "null"
    if isinstance(value, float) and not _is_finite(value):
        return str(value).replace("nan", "NaN")
    if isinstance(value, str) and not value.strip():
        return "only white space" if value else "empty"
    return "empty" if value in ([], {}) else f"a {type(value).__name__}"
