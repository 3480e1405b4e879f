"""The database of a sweep's study: its URL, opening it, and errors when it cannot be reached."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from training_lens.config.schema import SweepSection
from training_lens.errors import ConfigurationError, TrainingError
from training_lens.sweeps.worker import GRACE_SECONDS, PULSE_SECONDS
from training_lens.utils.formatting import describe_error

OPENING_TRIES = 5
SQLITE_WAIT_SECONDS = 60  # for another process's write; SQLite's default of 5 is short on a busy disk


def file_url(path: Path) -> str:
    """The URL of a SQLite file, whatever signs its path has."""
    return URL.create("sqlite", database=str(path.resolve())).render_as_string()


def require_persistent(url: str) -> None:
    if url.startswith("sqlite") and (url.endswith("://") or ":memory:" in url or "mode=memory" in url):
        raise ConfigurationError(
            f"sweep.storage: {url} is a database in memory, which no other process sees and no later start goes on "
            "with. Give a file, such as sqlite:///study.db, or leave it out."
        )


def open_storage(url: str) -> RDBStorage:
    """The storage; a few tries, since processes that start together make its tables at once."""
    options: dict[str, Any] = {"connect_args": {"timeout": SQLITE_WAIT_SECONDS}} if url.startswith("sqlite") else {}
    with explain_storage(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for left in reversed(range(OPENING_TRIES)):
            try:
                return RDBStorage(
                    url, engine_kwargs=options, heartbeat_interval=PULSE_SECONDS, grace_period=GRACE_SECONDS
                )
            except (SQLAlchemyError, StorageInternalError):
                if not left:
                    raise
                time.sleep(0.3 + 0.3 * secrets.randbelow(3))
    raise AssertionError("the last try returns or raises")


@contextmanager
def explain_storage(url: str) -> Iterator[None]:
    """Within the block, what goes wrong in opening is a ConfigurationError that names the storage, not its password."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError) as error:
        raise ConfigurationError(
            f"sweep.storage: {_hide_password(url)} cannot be opened: {describe_error(error.__cause__ or error)} Give a "
            "URL such as postgresql://USER:PASSWORD@HOST/DATABASE (with its driver installed), or leave it out for a "
            "file."
        ) from error


def _hide_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "what is given"  # it may hold a password where a URL has none


@contextmanager
def explain_lost_storage(settings: SweepSection) -> Iterator[None]:
    """Within the block, a database that does not answer any more is one clear error; the study goes on from there."""
    try:
        yield
    except StorageInternalError as error:
        raise TrainingError(
            f"the storage of the sweep '{settings.name}' does not answer: {describe_error(error.__cause__ or error)} "
            "Nothing that finished is lost; start the same command again."
        ) from error
