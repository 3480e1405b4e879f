"""Which keys of a row are its ids: names by which people find the row again, kept beside its answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

NAMES = {"id", "uid", "uuid", "guid", "qid", "idx", "index", "hash", "sha256", "md5"}  # lower case, letters and digits
ENDING = re.compile(r"(?:[_\-. ](?:id|uid|uuid|idx|ID|Id|UID|UUID)|[a-z0-9](?:Id|ID|Uid|UUID))$")


def find_id_keys(keys: Iterable[str], used: Collection[str]) -> tuple[str, ...]:
    """The keys that hold ids: `id`, `question_id`, `customId`, `UUID` and their like, in the rows' order.

    Args:
        used: keys that mean something else, such as the domain's; and names that an output line has already.
    """
    return tuple(key for key in keys if key not in used and is_id_name(key))


def is_id_name(key: str) -> bool:
    """Whether a key of this name holds an id."""
    return re.sub(r"[^a-z0-9]", "", key.lower()) in NAMES or bool(ENDING.search(key))


def read_ids(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A row's ids by key; one that is no text or number is none, and left out."""
    found = {key: values[key] for key in keys if key in values}
    return {key: value for key, value in found.items() if value is None or isinstance(value, str | int | float)}
