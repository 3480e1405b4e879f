"""Values of rows as text, or the reason why they are none."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from training_lens.data.types import Row
from training_lens.errors import DatasetError

NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdd3]")


def json_of(place: str, text: Any, expected: str) -> Any:
    """The value that `text` writes in JSON; `expected` says for messages what it should be."""
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{place}: expected {expected}, found {str(text)[:60]!r} ({error}).") from error


def text_of(row: Row, key: str) -> str:
    """The text (or number, as text) under a key.

    Raises:
        DatasetError: it is missing, null, NaN, empty or no text; names row and key.
    """
    if key not in row.values:
        there = ", ".join(sorted(map(str, row.values))) or "none"
        raise DatasetError(f"{row.place}: has no field '{key}' (its fields: {there}). Add it, or remove the row.")
    value = row.values[key]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number or (isinstance(value, str) and value.strip())):
        raise DatasetError(f"{row.place}: '{key}' is {kind_of(value)}, expected text. Mend it, or remove the row.")
    return encodable(f"{row.place}: '{key}'", str(value))


def encodable(place: str, text: str) -> str:
    """`text`, if UTF-8 can write it and none of it is a noncharacter that stands for other text in templates."""
    if found := None if text.isascii() else NO_TEXT.search(text):
        what = "half a surrogate pair" if "\ud800" <= found[0] <= "\udfff" else "a noncharacter of Unicode"
        raise DatasetError(f"{place} holds {what} (U+{ord(found[0]):04X}) at {found.start()}. Take it out.")
    return text


def optional_text(row: Row, key: str | None) -> str:
    """As `text_of`; empty where the row has nothing there."""
    value = row.values.get(key) if key else None
    return "" if key is None or value is None or value == "" else text_of(row, key)


def kind_of(value: Any) -> str:
    """What a value is, for messages: 'null', 'empty', 'a list'."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    if isinstance(value, str) and not value.strip():
        return "only white space" if value else "empty"
    return "empty" if value in ([], {}) else f"a {type(value).__name__}"
