"""The key of a server, and when it needs one."""

from __future__ import annotations

import os

from training_lens.errors import ConfigurationError
from training_lens.web.listener import is_loopback

KEY_VARIABLE = "TRAINING_LENS_API_KEY"


def read_key() -> str | None:
    """The key that the environment gives.

    Raises:
        ConfigurationError: no client could send it.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.strip() == key and key and key.isascii() and key.isprintable()):
        raise ConfigurationError(
            f"{KEY_VARIABLE} is empty, begins or ends with a space, or has characters that no HTTP header can hold. "
            "Set it to printable ASCII characters, or unset it."
        )
    return key


def check_access(host: str, key: str | None) -> None:
    """Refuse to be reached by others without a key.

    Raises:
        ConfigurationError: says what to set.
    """
    if key is None and not is_loopback(host):
        raise ConfigurationError(
            f"--host {host}: other machines can reach this address, so the server needs a key. Set {KEY_VARIABLE}, "
            "which clients then give as their API key; or leave --host out to serve this machine only."
        )
