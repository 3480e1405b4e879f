"""The database of a sweep's study: its URL, its connections, and its errors, none of which shows a password."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from training_lens.errors import ConfigurationError, TrainingError
from training_lens.utils.formatting import describe_error

OPENING_TRIES = 5
SQLITE_WAIT_SECONDS = 60  # for another process's write; SQLite's default of 5 is short on a busy disk
OPENING_LOCK = 7_305_808_869  # an advisory lock of PostgreSQL: any number that no other program uses
OPENING_WAIT = "60s"
# Of libpq. A host that is gone is noticed in seconds when connecting, and in a minute later on; its own limits are two
# minutes and a quarter of an hour. What the URL sets comes first.
LIBPQ_SETTINGS = {
    "client_encoding": "utf8",  # of a database without an encoding (initdb in the C locale), psycopg gives bytes
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}


def read_url(storage: str | None, folder: Path) -> URL:
    """The URL of `sweep.storage`; without one, that of study.db in the sweep's folder.

    Raises:
        ConfigurationError: it is no URL, or that of a database in memory. The URL is not shown, because a wrong one may
            have its password anywhere.
    """
    if storage is None:
        return URL.create("sqlite", database=str((folder / "study.db").resolve()))
    if storage.startswith("sqlite") and (storage.endswith("://") or ":memory:" in storage or "mode=memory" in storage):
        raise ConfigurationError(
            f"sweep.storage: {storage} is a database in memory, which other processes cannot see and later starts "
            "cannot resume. Give a file, such as sqlite:///study.db, or leave it out."
        )
    if not storage.startswith("sqlite") and storage.partition("?")[0].count("@") > 1:
        raise ConfigurationError(
            "sweep.storage: the given URL cannot be opened: it has more than one '@'. Write %40 for that of a user or "
            "a password, and %25 for a '%'."
        )
    try:
        url = make_url(storage)
    except (SQLAlchemyError, ValueError):
        raise ConfigurationError(
            "sweep.storage: the given URL cannot be opened: it has not the form postgresql://USER@HOST:PORT/DATABASE."
        ) from None  # the original error may show a part of the password
    if url.drivername in ("postgres", "postgresql"):
        driver = "psycopg2" if find_spec("psycopg2") and not find_spec("psycopg") else "psycopg"
        url = url.set(drivername=f"postgresql+{driver}")
    return url


def describe_url(url: URL) -> str:
    """The URL without its password, and without its query, which may hold one as well."""
    return URL.create(url.get_backend_name(), url.username, None, url.host, url.port, url.database).render_as_string()


@contextmanager
def open_storage(url: URL, takeover_seconds: int) -> Iterator[RDBStorage]:
    """The storage, to be used after the context as well. Inside it, a study can be created.

    Processes that start together would create tables and study at once. In PostgreSQL they come one after the other;
    elsewhere creating the tables is tried several times.

    Args:
        takeover_seconds: see `sweep.takeover_seconds`.

    Raises:
        ConfigurationError: it cannot be opened, or inside the context it cannot be read or written.
    """
    with _explain_opening(url):
        engine = create_engine(url, **_engine_options(url))
        try:
            with engine.connect() as connection:  # first of all, because what fails here would fail again
                if engine.name == "postgresql":
                    connection.execute(text(f"SET LOCAL lock_timeout = '{OPENING_WAIT}'"))
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": OPENING_LOCK})
                yield _create_storage(url, takeover_seconds)
        finally:
            engine.dispose()


def _engine_options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": SQLITE_WAIT_SECONDS}}
    options: dict[str, Any] = {"pool_pre_ping": True}  # a connection that waited for hours may be closed
    if url.drivername in ("postgresql+psycopg", "postgresql+psycopg2"):
        options["connect_args"] = {name: value for name, value in LIBPQ_SETTINGS.items() if name not in url.query}
    return options


def _create_storage(url: URL, takeover_seconds: int) -> RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for left in reversed(range(OPENING_TRIES)):
            try:
                storage = RDBStorage(
                    url.render_as_string(hide_password=False),
                    engine_kwargs=_engine_options(url),
                    heartbeat_interval=takeover_seconds,  # unused: heartbeats are ours
                    grace_period=takeover_seconds,
                )
                break
            except (SQLAlchemyError, StorageInternalError):
                if not left:
                    raise
                time.sleep(0.3 + 0.3 * secrets.randbelow(3))
    if storage.engine.name == "postgresql":
        event.listen(storage.engine, "connect", _use_utc)
        storage.engine.dispose()  # the connections so far
    return storage


def _use_utc(connection: Any, _record: object) -> None:
    """Optuna compares heartbeats as local times of the session: another zone, or the end of summer time, is an hour."""
    connection.cursor().execute("SET TIME ZONE 'UTC'")
    connection.commit()


@contextmanager
def _explain_opening(url: URL) -> Iterator[None]:
    """Inside the context, an error of the database becomes a ConfigurationError."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"sweep.storage: {describe_url(url)} cannot be opened: its driver is not installed "
            f"({describe_error(error).removesuffix('.')}). For PostgreSQL: pip install 'training-lens[postgresql]'."
        ) from error
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise ConfigurationError(
            f"sweep.storage: {describe_url(url)} cannot be opened: {_describe_cause(error)} Give a URL such as "
            "postgresql://USER@HOST:PORT/DATABASE of a server that runs and a database that exists, or leave "
            "it out for a file."
        ) from error


@contextmanager
def explain_lost_storage(study: str, url: URL) -> Iterator[None]:
    """Inside the context, a database that no longer answers becomes a TrainingError; the sweep can be resumed."""
    try:
        yield
    except StorageInternalError as error:
        raise TrainingError(
            f"the storage of the sweep '{study}' ({describe_url(url)}) does not answer: {_describe_cause(error)} No "
            "finished trial is lost, and one that was running continues from its last checkpoint: start the same "
            "command again when it answers."
        ) from error


def _describe_cause(error: BaseException) -> str:
    """What the driver said, without what SQLAlchemy and Optuna add."""
    while isinstance(error, SQLAlchemyError | StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return describe_error(error)
