"""The database of a sweep's study: its URL, opening it, and errors when it cannot be reached."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from training_lens.config.schema import SweepSection
from training_lens.errors import ConfigurationError, TrainingError
from training_lens.sweeps.worker import GRACE_SECONDS, PULSE_SECONDS
from training_lens.utils.formatting import describe_error

OPENING_TRIES = 5
SQLITE_WAIT_SECONDS = 60  # for another process's write; SQLite's default of 5 is short on a busy disk


def open_storage(url: str) -> RDBStorage:
    """Open the storage, with a few tries because processes that start together create its tables at once.

    Raises:
        ConfigurationError: it cannot be opened, or is a database in memory.
    """
    if url.startswith("sqlite") and (url.endswith("://") or ":memory:" in url or "mode=memory" in url):
        raise ConfigurationError(
            f"sweep.storage: {url} is a database in memory, which other processes cannot see and later starts cannot "
            "resume. Give a file, such as sqlite:///study.db, or leave it out."
        )
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
    """Inside the context, an error in opening becomes a ConfigurationError that names the storage without password."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError) as error:
        shown = "the given URL"  # an invalid one may contain a password anywhere
        with suppress(SQLAlchemyError):
            shown = make_url(url).render_as_string(hide_password=True)
        raise ConfigurationError(
            f"sweep.storage: {shown} cannot be opened: {describe_error(error.__cause__ or error)} Give a "
            "URL such as postgresql://USER:PASSWORD@HOST/DATABASE (with its driver installed), or leave it out for a "
            "file."
        ) from error


@contextmanager
def explain_lost_storage(settings: SweepSection) -> Iterator[None]:
    """Inside the context, a database that no longer answers becomes a TrainingError; the sweep can be resumed."""
    try:
        yield
    except StorageInternalError as error:
        raise TrainingError(
            f"the storage of the sweep '{settings.name}' does not answer: {describe_error(error.__cause__ or error)} "
            "No finished trial is lost; start the same command again."
        ) from error
