"""Secrets stay where they are: known in what is about to be written, and struck out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

STRUCK = "***"
NAMED = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?)(_|$)", re.I)
SHORTEST = 8  # characters of a secret: shorter values are words
FORMS = (
    re.compile(r"hf_[A-Za-z0-9]{20,}"),  # Hugging Face
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),  # AWS access keys
    re.compile(r"\bwandb_v\d_[A-Za-z0-9_]{20,}"),
    re.compile(r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password of a URL
    re.compile(r"(?i)(?<=signature=)[^&\s]+"),  # of a signed URL
    re.compile(r"(?i)(?<=x-amz-security-token=)[^&\s]+"),
)


@cache
def _in_environment(environment: frozenset[tuple[str, str]]) -> re.Pattern[str] | None:
    values = {value for name, value in environment if NAMED.search(name) and len(value) >= SHORTEST}
    return re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None


def redacted(text: str) -> str:
    """`text` with everything struck out that is a secret of the environment, or has the form of one."""
    known = _in_environment(frozenset((k, v) for k, v in os.environ.items() if NAMED.search(k)))
    for pattern in (*((known,) if known else ()), *FORMS):
        text = pattern.sub(STRUCK, text)
    return text


def secrets_in(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of nested config values that hold a secret, or are named like one; rows in memory are no settings."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from secrets_in(value, f"{name}.")
        elif isinstance(value, list | tuple):
            if any(isinstance(item, str) and redacted(item) != item for item in value):
                yield name
        elif isinstance(value, str) and (redacted(value) != value or (value and NAMED.search(str(key)))):
            yield name


def has_password(url: str) -> bool:
    """Whether a URL carries a password."""
    return urlsplit(url).password is not None
