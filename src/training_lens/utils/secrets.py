"""Finds secrets in text that is about to be written, and redacts them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

STRUCK = "***"
ROWS = ("data.train", "data.validation")
NAMED = re.compile(
    r"(^|_)(TOKEN|SECRET|PASS|PAT|(API|ACCESS|PRIVATE|SECRET|ACCOUNT|STORAGE)_?KEY|CREDENTIALS?|CONNECTION_STRING)(_|$)"
    r"|PASSWORD|PASSWD|PASSPHRASE",
    re.I,
)
PLACE = re.compile(
    r"_(FILE|PATH|DIR|URL|URI)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.I
)  # where a secret is, not the secret
SHORTEST = 8  # characters; shorter values are words
SHORTEST_OF_LETTERS = 16  # of lower-case letters only: PASSWORD=training would redact half a log
IN_QUERY = (
    "token access_token api_key apikey password secret sig signature x-amz-signature x-amz-security-token".split()
)


def _word_pattern(start: str, rest: str) -> str:
    """A pattern anchored at a word's start, also after an escaped line break as JSON and Python write it."""
    behind = "." * len(start)
    return rf"{re.escape(start)}(?:(?<![\w-]{behind})|(?<=\\[nrt]{behind})){rest}"


# Patterns start with a literal where possible, which is fast; a group is kept. Lengths have an upper limit where a
# search could otherwise scan to the end of the text from every position.
FORMS = tuple(
    re.compile(form)
    for form in (
        r"hf_[A-Za-z0-9]{20,}",  # Hugging Face
        _word_pattern("AKIA", r"[A-Z0-9]{16}\b"),  # AWS access keys
        _word_pattern("ASIA", r"[A-Z0-9]{16}\b"),
        _word_pattern("wandb_v", r"\d_[A-Za-z0-9_]{20,}"),
        _word_pattern("sk-", "[A-Za-z0-9_-]{20,}"),  # OpenAI, Anthropic, OpenRouter
        _word_pattern("gsk_", "[A-Za-z0-9]{20,}"),  # Groq
        _word_pattern("xai-", "[A-Za-z0-9]{20,}"),
        _word_pattern("r8_", "[A-Za-z0-9]{20,}"),  # Replicate
        r"AIza[A-Za-z0-9_-]{30,}",  # Google
        r"ya29\.[A-Za-z0-9_-]{20,}",  # Google OAuth
        r"GOCSPX-[A-Za-z0-9_-]{20,}",
        r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
        r"xox[a-z](?:-[A-Za-z0-9]{4,}){2,}",  # Slack
        r"glpat-[A-Za-z0-9_-]{16,}",  # GitLab
        r"npm_[A-Za-z0-9]{30,}",
        r"pypi-[A-Za-z0-9_-]{40,}",
        r"dop_v1_[a-f0-9]{40,}",  # DigitalOcean
        r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",  # SendGrid
        r"g(?:h[a-z]|ithub_pat)_[A-Za-z0-9_]{20,}",  # GitHub
        _word_pattern("eyJ", r"[\w-]{8,4096}+\.[\w-]{8,8192}+\.[\w-]*+"),  # JWT: header, claims, signature
        r"(hooks\.slack\.com/(?:services|workflows|triggers)/)[A-Za-z0-9/_-]{8,}",
        r"(discord(?:app)?\.com/api/(?:v\d+/)?webhooks/)[\w/-]{8,}",
        r"(\.webhook\.office\.com/)[^\s\"'<>]{8,512}",  # Teams
        r"(api\.telegram\.org/(?:file/)?bot)\d+:[A-Za-z0-9_-]{20,}",
        # A key up to its last line, or as far as it goes; line breaks may be escaped as in JSON.
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:\\+[nrt]|[\w+/=\s:,.]|-(?!----))*+"
        r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?",
        r"(Bearer )[A-Za-z0-9._~+/=-]{8,}",
        r"(Basic )[A-Za-z0-9+/=]{16,}",
        # user:password of a URL; after a port, '@' is part of a path
        r"(://)[^/\s:@]{0,256}:(?!\d+/)[^\s@\"'<>]{1,512}+(?=@)",
        r"(://)[^/\s:@]{20,512}+(?=@)",  # a token in place of the user
        rf"(?i)([?&;](?:{'|'.join(IN_QUERY)})=)[^&\s'\"<>]+",  # of a signed URL, or of one in HTML
        r"(?i)(secret_?access_?key[\\\"']{0,4}\s{0,4}[:=]\s{0,4}[\\\"']{0,4})[A-Za-z0-9/+]{40}",  # AWS
        r"((?:Account|SharedAccess)Key=)[A-Za-z0-9/+=]{40,}",  # Azure
    )
)


@lru_cache(maxsize=4)
def _environment_pattern(environment: frozenset[tuple[str, str]]) -> re.Pattern[str] | None:
    spelled: set[str] = set()
    for value in {value.strip() for _, value in environment if _is_secret(value.strip())}:
        # As it is, and as written in URLs, JSON and Python strings; also each of its lines.
        spelled |= {value, quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1], repr(value)[1:-1]}
        spelled |= {line.strip() for line in value.splitlines() if _is_secret(line.strip())}
    return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))) if spelled else None


@lru_cache(maxsize=1024)
def _is_named(variable: str) -> bool:
    return bool(NAMED.search(variable)) and not PLACE.search(variable)


def _is_secret(value: str) -> bool:
    """Whether a value is long and unusual enough to be redacted everywhere."""
    return len(value) >= (SHORTEST_OF_LETTERS if value.isalpha() and value.islower() else SHORTEST)


def redact_text(text: str) -> str:
    """`text` with secrets of the environment, and everything that has the form of a secret, replaced by ***.

    Secrets of the environment are recognized by the variable's name. Values under 8 characters, and lower-case words
    under 16, are kept: redacting them everywhere would make a log unreadable.
    """
    known = _environment_pattern(frozenset((name, os.environ[name]) for name in os.environ if _is_named(name)))
    for pattern in (*((known,) if known else ()), *FORMS):
        text = pattern.sub(rf"\g<1>{STRUCK}" if pattern.groups else STRUCK, text)
    return text


def redact_values(value: Any) -> Any:
    """A JSON value with secrets redacted in all its strings and keys; numbers are unchanged."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {redact_values(key): redact_values(item) for key, item in value.items()}
    return [redact_values(item) for item in value] if isinstance(value, list | tuple) else value


def find_secret_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """The keys of nested config values that hold a secret or are named like one. In-memory rows are not searched.

    Example:
        >>> list(find_secret_keys({"mirror": "s3://me:password@host", "custom": [{"token": 1}, {"token": ""}]}))
        ['mirror', 'custom[0].token']
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
    elif not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        return
    elif _is_named(key) or redact_text(str(value)) != str(value):
        yield name
