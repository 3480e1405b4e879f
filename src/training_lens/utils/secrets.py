"""Secrets stay where they are: known in what is about to be written, and struck out of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

STRUCK = "***"
ROWS = ("data.train", "data.validation")
NAMED = re.compile(
    r"(^|_)(TOKEN|SECRET|PASS|PAT|(API|ACCESS|PRIVATE|SECRET|ACCOUNT|STORAGE)_?KEY|CREDENTIALS?|CONNECTION_STRING)(_|$)"
    r"|PASSWORD|PASSWD|PASSPHRASE",
    re.I,
)
PLACE = re.compile(r"_(FILE|PATH|DIR|URL|URI)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.I)  # of a secret, not the secret
SHORTEST = 8  # characters of a secret: shorter values are words
SHORTEST_OF_LETTERS = 16  # of one in lower-case letters alone: PASSWORD=training would strike half a log
IN_QUERY = (
    "token access_token api_key apikey password secret sig signature x-amz-signature x-amz-security-token".split()
)
FORMS = tuple(
    re.compile(form)
    for form in (
        r"hf_[A-Za-z0-9]{20,}",  # Hugging Face
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS access keys
        r"\bwandb_v\d_[A-Za-z0-9_]{20,}",
        r"\bsk-[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic
        r"\b(?:gh[a-z]|github_pat)_[A-Za-z0-9_]{20,}",  # GitHub
        r"(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}",
        r"(?<=Basic )[A-Za-z0-9+/=]{16,}",
        r"(?<=://)[^/\s:@]*:(?!\d+/)[^\s@]+(?=@)",  # user:password of a URL; behind a port, '@' is part of a path
        r"(?<=://)[^/\s:@]{20,}(?=@)",  # a token in place of the user
        rf"(?i)(?<==)(?:{'|'.join(rf'(?<=[?&]{name}=)' for name in IN_QUERY)})[^&\s'\"]+",  # of a signed URL
    )
)


@lru_cache(maxsize=4)
def _in_environment(environment: frozenset[tuple[str, str]]) -> re.Pattern[str] | None:
    values = {value.strip() for _, value in environment if _is_secret(value.strip())}
    spelled = sorted({text for value in values for text in _spellings(value)}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None


@lru_cache(maxsize=1024)
def _is_named(variable: str) -> bool:
    return bool(NAMED.search(variable)) and not PLACE.search(variable)


def _is_secret(value: str) -> bool:
    """Whether a value is long and odd enough to be looked for everywhere."""
    return len(value) >= (SHORTEST_OF_LETTERS if value.isalpha() and value.islower() else SHORTEST)


def _spellings(value: str) -> Iterator[str]:
    """A value as it is, and as it stands in URLs, in JSON and in Python texts; and its lines, where it has several."""
    yield from (value, quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1], repr(value)[1:-1])
    yield from (line.strip() for line in value.splitlines() if _is_secret(line.strip()))


def redacted(text: str) -> str:
    """`text` with everything struck out that is a secret of the environment, or has the form of one.

    A secret of the environment is known by its variable's name. Values under 8 characters, and words of lower-case
    letters under 16, are left alone: struck out wherever they stand, they would make a log unreadable.
    """
    known = _in_environment(frozenset((name, os.environ[name]) for name in os.environ if _is_named(name)))
    for pattern in (*((known,) if known else ()), *FORMS):
        text = pattern.sub(STRUCK, text)
    return text


def secrets_in(values: Mapping[str, Any]) -> Iterator[str]:
    """The keys of nested config values that hold a secret, or are named like one; rows in memory are no settings.

    Example:
        >>> list(secrets_in({"output": {"mirror": "s3://me:password@host"}, "custom": [{"token": 1}, {"token": ""}]}))
        ['output.mirror', 'custom[0].token']
    """
    for key, value in values.items():
        yield from _secrets_of(str(key), str(key), value)


def _secrets_of(name: str, key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner, of_inner in value.items():
            yield from _secrets_of(f"{name}.{inner}", str(inner), of_inner)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            if not (name in ROWS and isinstance(item, Mapping)):
                yield from _secrets_of(f"{name}[{place}]", key, item)
    elif _is_text_or_number(value) and (_is_named(key) or redacted(str(value)) != str(value)):
        yield name


def _is_text_or_number(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def has_password(url: str) -> bool:
    """Whether a URL carries a password."""
    return urlsplit(url).password is not None
